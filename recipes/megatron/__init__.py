"""Between an artifact and Megatron: names and layouts, torch_dist folders, argument files; no Megatron is imported."""
