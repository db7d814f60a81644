"""Tables that do not fit in memory: Parquet, Dask and iterators; guides/large_tables.md says how to use them."""
