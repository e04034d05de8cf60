"""The donor's and the student's architectures in plain PyTorch; importing the package imports no torch."""
