"""The store: Arrow shards with a manifest; writing, reading, extending and fetching it."""
