"""Recipes and the data they ship with."""
