"""From rows to Parquet files in staging."""
