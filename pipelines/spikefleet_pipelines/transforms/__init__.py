"""From stored images to normalised batches: configurations, and what does as they say."""
