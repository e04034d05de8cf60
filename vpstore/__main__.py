"""`python -m vpstore`: the command line without its installed script."""

from vpstore.cli import main

if __name__ == "__main__":
    main()
