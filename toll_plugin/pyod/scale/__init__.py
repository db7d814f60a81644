"""Tables that do not fit in memory: Parquet, Dask and iterators; README.md beside this file says how to use them."""
