"""The schema as text: what the catalogs say, normalised, for the golden file.

Called by `tests/db/test_schema.py`. Invariant: the same migrations give the same text, whatever the
order of files, oids or names of databases.
"""

from __future__ import annotations

import json
from typing import Any

import asyncpg

TABLES = """
select c.oid, c.relname as name, c.relkind::text as kind, array_to_string(c.reloptions, ', ') as options,
       c.relrowsecurity as row_security, c.relforcerowsecurity as forced,
       pg_get_userbyid(c.relowner) as owner
  from pg_class c
 where c.relnamespace = 'millpond'::regnamespace and c.relkind in ('r', 'p', 'v', 'm', 'f')
 order by c.relname collate "C"
"""
COLUMNS = """
select concat_ws(' ', a.attname, format_type(a.atttypid, a.atttypmod),
                 case when a.attnotnull then 'not null' end,
                 'default ' || pg_get_expr(d.adbin, d.adrelid),
                 case a.attidentity when 'a' then 'identity always' when 'd' then 'identity' end,
                 case a.attgenerated when 's' then 'stored' when 'v' then 'virtual' end,
                 case when a.attstorage <> t.typstorage then 'storage ' || a.attstorage::text end) as line
  from pg_attribute a
  join pg_type t on t.oid = a.atttypid
  left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
 where a.attrelid = $1 and a.attnum > 0 and not a.attisdropped
 order by a.attnum
"""
# Not-null constraints are part of the columns, and have rows of their own from Postgres 18 on.
CONSTRAINTS = """
select conname::text || ': ' || pg_get_constraintdef(oid) as line
  from pg_constraint where conrelid = $1 and contype <> 'n' order by conname collate "C"
"""
INDEXES = """
select pg_get_indexdef(indexrelid) as line from pg_index where indrelid = $1 order by 1
"""
POLICIES = """
select concat_ws(' ', polname, case when not polpermissive then 'restrictive' end, polcmd::text, 'to',
                 (select string_agg(role, ', ' order by role)
                    from (select case r when 0 then 'public' else pg_get_userbyid(r)::text end as role
                            from unnest(polroles) r) named),
                 'using ' || pg_get_expr(polqual, polrelid),
                 'with check ' || pg_get_expr(polwithcheck, polrelid)) as line
  from pg_policy where polrelid = $1 order by polname collate "C"
"""
TRIGGERS = """
select pg_get_triggerdef(oid) as line from pg_trigger
 where tgrelid = $1 and not tgisinternal order by tgname collate "C"
"""
GRANTS = """
select concat(grantee, '.' || column_name::text, ': ', string_agg(privilege, ' ' order by privilege)) as line
  from (select case g.grantee when 0 then 'public' else pg_get_userbyid(g.grantee) end as grantee,
               null as column_name, g.privilege_type as privilege, c.relowner, g.grantee as grantee_oid
          from pg_class c cross join aclexplode(c.relacl) g where c.oid = $1
        union all
        select case g.grantee when 0 then 'public' else pg_get_userbyid(g.grantee) end,
               a.attname, g.privilege_type, c.relowner, g.grantee
          from pg_class c join pg_attribute a on a.attrelid = c.oid
         cross join aclexplode(a.attacl) g where c.oid = $1) held
 where grantee_oid <> relowner
 group by grantee, column_name order by grantee, column_name nulls first
"""
FUNCTIONS = """
select p.oid::regprocedure::text as name, pg_get_userbyid(p.proowner) as owner,
       pg_get_functiondef(p.oid) as definition,
       array(select case g.grantee when 0 then 'public' else pg_get_userbyid(g.grantee) end
               from aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) g
              where g.grantee <> p.proowner order by 1) as executable_by
  from pg_proc p where p.pronamespace = 'millpond'::regnamespace order by 1
"""
ROLES = """
select rolname as name, rolcanlogin as login, rolsuper as super, rolbypassrls as bypass,
       rolcreaterole as create_role, rolcreatedb as create_db, array(select unnest(rolconfig) order by 1) as settings,
       array(select pg_get_userbyid(m.roleid) from pg_auth_members m
              where m.member = r.oid and m.inherit_option order by 1) as inherits
  from pg_roles r where rolname like 'millpond%' order by rolname collate "C"
"""
SCHEMA_GRANTS = """
select pg_get_userbyid(g.grantee) as grantee, g.privilege_type as right
  from pg_namespace n cross join aclexplode(n.nspacl) g
 where n.nspname = 'millpond' and g.grantee <> n.nspowner order by 1, 2
"""


async def dump(con: asyncpg.Connection) -> str:
    """Return the schema `millpond` of this database as JSON text; `con` is the superuser's."""
    # Without the schema in the path, every name in a definition comes with it.
    await con.execute("set search_path = pg_catalog")
    tables = {}
    for table in await _rows(con, TABLES):
        oid, name = table.pop("oid"), table.pop("name")
        parts = {
            "columns": COLUMNS,
            "constraints": CONSTRAINTS,
            "indexes": INDEXES,
            "policies": POLICIES,
            "triggers": TRIGGERS,
            "grants": GRANTS,
        }
        lines = {
            part: [row["line"] for row in await con.fetch(sql, oid)] for part, sql in parts.items()
        }
        tables[name] = table | {part: found for part, found in lines.items() if found}
    found = {
        "tables": tables,
        "functions": await _rows(con, FUNCTIONS),
        "roles": await _rows(con, ROLES),
        "schema_grants": await _rows(con, SCHEMA_GRANTS),
    }
    return json.dumps(found, indent=1) + "\n"


async def _rows(con: asyncpg.Connection, sql: str, *args: Any) -> list[dict[str, Any]]:
    """Return rows without their empty members, which keeps the file readable."""
    found = await con.fetch(sql, *args)
    return [
        {name: value for name, value in row.items() if value not in (None, "", [], False)}
        for row in found
    ]
