-- Times are nanoseconds since 1970 UTC in `_ns` and seconds in `_s`; yes and no are 1 and 0.
-- JSON documents are those of the API.

CREATE TABLE settings (
    name TEXT PRIMARY KEY,
    value TEXT NOT NULL
);

CREATE TABLE servers (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    machine TEXT NOT NULL,
    revoked BIGINT NOT NULL DEFAULT 0,
    goal_s BIGINT NOT NULL DEFAULT 30,
    assignment_version BIGINT NOT NULL DEFAULT 1,
    orders_made BIGINT NOT NULL DEFAULT 0,
    certificate_ends_s BIGINT NOT NULL,
    inventory TEXT NOT NULL,
    report TEXT,
    heard_ns BIGINT
);

-- `state`: protected, unprotected (its replica stays and takes it up again), retired (another
-- size came in its place).
CREATE TABLE volumes (
    id TEXT PRIMARY KEY,
    server TEXT NOT NULL REFERENCES servers (id),
    name TEXT NOT NULL,
    path TEXT NOT NULL,
    size_bytes BIGINT NOT NULL,
    tracker TEXT NOT NULL,
    block_bytes BIGINT NOT NULL,
    excluded TEXT NOT NULL,
    state TEXT NOT NULL
);
CREATE INDEX volumes_by_server ON volumes (server);

CREATE TABLE targets (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    address TEXT NOT NULL,
    assignment_version BIGINT NOT NULL DEFAULT 1,
    report TEXT,
    heard_ns BIGINT
);

-- Only a digest is kept; the token is shown once.
CREATE TABLE tokens (
    sha256 TEXT PRIMARY KEY,
    role TEXT NOT NULL,
    ends_s BIGINT NOT NULL,
    used_s BIGINT
);

-- `state` is the final state that the agent reported; null before. `listed`: a cut's point stood
-- in a report of the target.
CREATE TABLE orders (
    server TEXT NOT NULL REFERENCES servers (id),
    number BIGINT NOT NULL,
    kind TEXT NOT NULL,
    made_ns BIGINT NOT NULL,
    state TEXT,
    ended_ns BIGINT,
    listed BIGINT NOT NULL DEFAULT 0,
    PRIMARY KEY (server, number)
);

CREATE INDEX orders_unlisted ON orders (listed);

CREATE TABLE certificates (
    serial TEXT PRIMARY KEY,
    role TEXT NOT NULL,
    begins_s BIGINT NOT NULL,
    ends_s BIGINT NOT NULL,
    revoked BIGINT NOT NULL DEFAULT 0
);
CREATE INDEX certificates_by_role ON certificates (role);

CREATE TABLE audit (
    at_ns BIGINT NOT NULL,
    who TEXT NOT NULL,
    what TEXT NOT NULL
);
