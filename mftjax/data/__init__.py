"""From sources of text to packed, masked batches that are drawn per source and can be resumed."""
