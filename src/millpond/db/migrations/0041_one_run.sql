-- One run at a time, cheaper: then beginning a statement takes longer than what it does, and a good part of that are checks. Each
-- check of each table that a statement writes is read from the catalog's text and planned anew, every time.

-- Whether a run's columns go together. What is unknown for a null is no objection, as in any check. It names nothing but what
-- is built in, and sets no path: one that was planned under another is planned anew, so no function with a path of its own
-- should write runs.
create function run_is_sound(outcome text, finished_at timestamptz, priority integer, parent_id uuid, parent_key text,
                             close_policy text, lent uuid, granted_by text, stamp integer, urgency text) returns boolean
  language plpgsql immutable parallel safe
as $$
begin
  return (outcome is null) = (finished_at is null)
    and outcome in ('succeeded', 'failed', 'cancelled')
    and priority between -100 and 100
    and (parent_id is null) = (parent_key is null)
    and (parent_id is null) = (close_policy is null)
    and close_policy in ('cancel', 'abandon', 'wait')
    and (lent is null) = (granted_by is null)
    and (lent is null or stamp is not null)
    and urgency = 'interactive';
end
$$;
revoke all on function run_is_sound(text, timestamptz, integer, uuid, text, text, uuid, text, integer, text) from public;
grant execute on function run_is_sound(text, timestamptz, integer, uuid, text, text, uuid, text, integer, text)
  to millpond_app, millpond_engine;

-- Rows are not read again: each met the same conditions under the checks that go. What stands in braces is read as it is,
-- where a list would be put together anew by every statement.
alter table run
  drop constraint run_check, drop constraint run_check1, drop constraint run_check2, drop constraint run_check3,
  drop constraint run_check4, drop constraint run_close_policy_check, drop constraint run_outcome_check,
  drop constraint run_priority_check, drop constraint run_urgency,
  add constraint run_is_sound check (run_is_sound(outcome, finished_at, priority, parent_id, parent_key, close_policy, lent,
                                                  granted_by, stamp, urgency)) not valid;
alter table item
  drop constraint item_kind_check, drop constraint item_state_check,
  add constraint item_kind_check check (kind = any ('{run,step}')) not valid,
  add constraint item_state_check check (state = any ('{scheduled,queued,running,waiting,awaiting_input}')) not valid;

-- What comes before one run is stored, where there is more to it than entering its org: refuses a caller whose rights are no
-- more what they were, and takes the price of one run from blocks. MP402: one of these is gone.
create function open_submit(org bigint, enters boolean, caller text, stamp integer, session uuid, lent uuid, blocks uuid[])
  returns bigint
  language plpgsql volatile
  set search_path = millpond, pg_temp
as $$
declare
  paying bigint;
begin
  if enters then
    perform set_config('millpond.org', org::text, true);
  end if;
  if caller is not null then
    perform refuse_stale(caller, stamp, session, lent);
  end if;
  if blocks is not null then
    perform from quota_block b where b.org_id = org and b.block_id = any(blocks) and b.ends_at > clock_timestamp() for key share;
    get diagnostics paying = row_count;
    if paying <> cardinality(blocks) then
      raise exception 'block' using errcode = 'MP402';
    end if;
    insert into quota_spend (org_id, block_id, amount) select org, u.block_id, 1 from unnest(blocks) as u(block_id);
  end if;
  return org;
end
$$;
revoke all on function open_submit(bigint, boolean, text, integer, uuid, uuid, uuid[]) from public;
grant execute on function open_submit(bigint, boolean, text, integer, uuid, uuid, uuid[]) to millpond_app, millpond_engine;
