"""Typed knobs of each recipe, one module a recipe; their values are part of a build key, their source is not."""
