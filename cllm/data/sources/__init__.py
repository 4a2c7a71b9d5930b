"""The crawler: what to fetch next, whether it may be fetched, and how it is kept."""
