-- Behind a filter: the device of the server where blocks are preserved that memory has no room for.
ALTER TABLE volumes ADD COLUMN reserve TEXT;
