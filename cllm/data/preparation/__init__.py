"""From files, archives and crawls to clean documents in sealed shards: tasks over finished files, their ledger, runners, the report."""
