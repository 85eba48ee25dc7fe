-- How long recovery points are kept, as `protect --keep` says it.
ALTER TABLE servers ADD COLUMN keep TEXT NOT NULL DEFAULT 'none';
