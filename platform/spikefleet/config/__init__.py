"""The configuration of a run: schema, recipes, overrides and error messages."""
