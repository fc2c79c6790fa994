-- Workers tell whom their idle slots help, and which slots are kept and reserved, so that replays can do the same.
alter table worker add column spill json not null default '{}';
