-- How people get in: refresh tokens, single-use tokens, the brake on guessing, mail that waits to be sent. All global.

-- What a session is renewed with, by its digest; used ones stay as long as the session, so that a second use is known.
create table refresh_token (
  digest bytea primary key check (length(digest) = 32),
  session_id uuid not null references login_session (session_id) on delete cascade,
  created_at timestamptz not null default clock_timestamp(),
  expires_at timestamptz not null,
  used_at timestamptz
);
create index refresh_token_of_session on refresh_token (session_id);
create index login_session_by_expiry on login_session (expires_at);

-- Links that work once, by the digest of their token: deleted when they are used.
create table single_use_token (
  digest bytea primary key check (length(digest) = 32),
  purpose text not null check (purpose in ('register', 'reset', 'operator', 'operator_reset')),
  email text,
  name text not null default '' check (length(name) <= 200),
  user_id uuid references account (user_id) on delete cascade,
  created_at timestamptz not null default clock_timestamp(),
  expires_at timestamptz not null,
  check ((purpose = 'reset') = (user_id is not null)),
  check ((purpose = 'register') = (email is not null))
);
create index single_use_token_of_user on single_use_token (user_id) where user_id is not null;
create index single_use_token_by_expiry on single_use_token (expires_at);

-- How far tries by one key (digest of what, address, email) have used up their allowance: the theoretical arrival time
-- of the generic cell rate algorithm. A row per key, so that nobody waits for somebody else's.
create table auth_brake (
  key bytea primary key check (length(key) = 32),
  arrival_at timestamptz not null
);
create index auth_brake_by_arrival on auth_brake (arrival_at);

-- Mail to be sent, sealed whole since it may hold a link; deleted when it is sent, refused or too old.
create table mail_outbox (
  mail_id uuid primary key,
  seal_key_id text not null,
  sealed bytea not null,
  tries integer not null default 0,
  due_at timestamptz not null default clock_timestamp(),
  expires_at timestamptz not null,
  created_at timestamptz not null default clock_timestamp()
);
create index mail_outbox_due on mail_outbox (due_at);

grant select, insert, update, delete on refresh_token, single_use_token, auth_brake, mail_outbox to millpond_app;
grant delete on login_session to millpond_app;
