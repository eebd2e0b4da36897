"""A store: Arrow shards with a manifest; written, read, extended, fetched."""
