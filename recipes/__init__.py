"""The recipes of the vpMoE upcycling chain; vpstore is a library to them."""
