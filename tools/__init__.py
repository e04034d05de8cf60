"""Commands that made what ships in `assets/`; nothing of a build imports them."""
