-- Ending a run writes a new version of its row. All runs of a page often end in one transaction, which frees nothing
-- before its commit: unless a page has room for each of them twice, some move to other pages and into every index anew.
alter table run set (fillfactor = 45);
