"""The configuration of a run: schema, recipes, overrides and the sentences of its errors."""
