"""The groups of calls that a client has, by noun.

Made by the clients. Invariant: both clients have these and no others. In every group `list` iterates over
a whole list and fetches pages as it goes; `page` gives one of them.
"""

from __future__ import annotations

from typing import Generic

from millpond.client.calls import (
    audit,
    control,
    events,
    inputs,
    issuers,
    knowledge,
    limits,
    many_runs,
    orgs,
    people,
    platform,
    quotas,
    runs,
    schedules,
    secrets,
    triggers,
)
from millpond.client.handles import run_method
from millpond.client.surface import Group, Kind, Sends, listing, method


class Runs(Group[Kind]):
    """Runs: start, find, tell, stop, repeat, one or many."""

    start = run_method(runs.start_run)
    start_many = method(runs.start_runs)
    get = run_method(runs.get_run)
    list = listing(runs.list_runs)
    page = method(runs.list_runs)
    event_page = method(runs.list_run_events)
    feed = listing(runs.list_org_events)
    feed_page = method(runs.list_org_events)
    why = method(runs.explain_run)
    signal = method(runs.signal_run)
    cancel = run_method(runs.cancel_run)
    rerun = run_method(runs.rerun_run)
    release = run_method(runs.release_run)
    resume = run_method(runs.resume_run)
    bulk = run_method(many_runs.act_on_runs)
    bulk_dry_run = method(many_runs.preview_bulk)


class Inputs(Group[Kind]):
    """Questions to humans."""

    list = listing(inputs.list_input_requests)
    page = method(inputs.list_input_requests)
    get = method(inputs.get_input_request)
    resolve = method(inputs.resolve_input_request)


class Flows(Group[Kind]):
    """Flows as workers published them."""

    list = listing(control.list_flows)
    get = method(control.get_flow)
    pause = method(control.pause_flow)
    resume = method(control.resume_flow)


class Queues(Group[Kind]):
    """Queues as the caller's org sees them."""

    list = listing(control.list_queues)
    pause = method(control.pause_queue)
    resume = method(control.resume_queue)


class Org(Group[Kind]):
    """The caller's org: what it is called and decides, and all of its work."""

    get = method(orgs.get_org)
    change = method(orgs.change_org)
    pause = method(control.pause_org)
    resume = method(control.resume_org)


class Pauses(Group[Kind]):
    """What is paused."""

    list = listing(control.list_pauses)


class Limits(Group[Kind]):
    """Ceilings on keys of the org's own work, beside those of the platform."""

    list = listing(limits.list_limits)
    saturation = listing(limits.list_saturation)
    recorded_runs = listing(limits.list_recorded_runs)
    put = method(limits.put_limit)
    delete = method(limits.delete_limit)
    brakes = listing(limits.list_brakes)
    release = method(limits.delete_brake)


class Workers(Group[Kind]):
    """Live worker processes."""

    list = listing(control.list_workers)


class Schedules(Group[Kind]):
    """Runs that start by the clock."""

    list = listing(schedules.list_schedules)
    page = method(schedules.list_schedules)
    create = method(schedules.create_schedule)
    get = method(schedules.get_schedule)
    change = method(schedules.change_schedule)
    delete = method(schedules.delete_schedule)
    pause = method(schedules.pause_schedule)
    resume = method(schedules.resume_schedule)
    run_now = run_method(schedules.run_schedule_now)


class Triggers(Group[Kind]):
    """Runs that start by events."""

    list = listing(triggers.list_triggers)
    page = method(triggers.list_triggers)
    create = method(triggers.create_trigger)
    get = method(triggers.get_trigger)
    change = method(triggers.change_trigger)
    delete = method(triggers.delete_trigger)
    pause = method(triggers.pause_trigger)
    resume = method(triggers.resume_trigger)


class Events(Group[Kind]):
    """Events from outside, for the triggers that listen."""

    send = method(events.send_event)
    send_many = method(events.send_events)
    list = listing(events.list_events)
    page = method(events.list_events)


class Knowledge(Group[Kind]):
    """Knowledge bases and their documents."""

    list = listing(knowledge.list_knowledge_bases)
    upload = run_method(knowledge.upload_document)
    documents = listing(knowledge.list_documents)
    search = method(knowledge.search_knowledge_base)


class Auth(Group[Kind]):
    """Signing in and out, accounts and links; needs no token."""

    sign_in = method(people.sign_in)
    refresh = method(people.refresh_session)
    sign_out = method(people.sign_out)
    register = method(people.register_account)
    confirm_registration = method(people.confirm_registration)
    request_password_reset = method(people.request_password_reset)
    confirm_password_reset = method(people.confirm_password_reset)
    claim_operator = method(people.claim_operator)


class Me(Group[Kind]):
    """Whoever calls."""

    get = method(people.get_me)
    change = method(people.change_me)
    list_sessions = listing(people.list_my_sessions)
    revoke_session = method(people.revoke_my_session)
    change_password = method(people.change_my_password)


class Members(Group[Kind]):
    """Who is in the caller's org, and who was asked to join."""

    list = listing(orgs.list_members)
    page = method(orgs.list_members)
    get = method(orgs.get_member)
    change = method(orgs.change_member)
    remove = method(orgs.remove_member)


class Roles(Group[Kind]):
    """Roles: built in, and of the org's own."""

    list = method(orgs.list_roles)
    put = method(orgs.put_role)
    delete = method(orgs.delete_role)


class Invitations(Group[Kind]):
    """Invitations into the caller's org; `accept` is for whoever was invited."""

    list = listing(orgs.list_invitations)
    page = method(orgs.list_invitations)
    create = method(orgs.create_invitation)
    get = method(orgs.get_invitation)
    resend = method(orgs.resend_invitation)
    revoke = method(orgs.revoke_invitation)
    accept = method(orgs.accept_invitation)


class ServicePrincipals(Group[Kind]):
    """Programs that act in the org as themselves."""

    list = listing(orgs.list_service_principals)
    page = method(orgs.list_service_principals)
    create = method(orgs.create_service_principal)
    get = method(orgs.get_service_principal)
    change = method(orgs.change_service_principal)


class ApiKeys(Group[Kind]):
    """API keys of the org."""

    list = listing(orgs.list_api_keys)
    page = method(orgs.list_api_keys)
    create = method(orgs.create_api_key)
    get = method(orgs.get_api_key)
    revoke = method(orgs.revoke_api_key)


class Secrets(Group[Kind]):
    """Secrets of the org: values go in, and never come out."""

    list = listing(secrets.list_secrets)
    page = method(secrets.list_secrets)
    create = method(secrets.create_secret)
    get = method(secrets.get_secret)
    put = method(secrets.put_secret)
    delete = method(secrets.delete_secret)


class Grants(Group[Kind]):
    """Operators whom the org's owners let in."""

    list = listing(orgs.list_grants)
    page = method(orgs.list_grants)
    create = method(orgs.create_grant)
    get = method(orgs.get_grant)
    end = method(orgs.end_grant)


class Issuers(Group[Kind]):
    """Outside issuers whose tokens the org accepts, and whom they vouch for."""

    list = listing(issuers.list_issuers)
    page = method(issuers.list_issuers)
    create = method(issuers.create_issuer)
    get = method(issuers.get_issuer)
    change = method(issuers.change_issuer)
    remove = method(issuers.remove_issuer)
    test = method(issuers.test_issuer)
    identities = listing(issuers.list_outside_identities)
    identity_page = method(issuers.list_outside_identities)
    get_identity = method(issuers.get_outside_identity)
    change_identity = method(issuers.change_outside_identity)


class Audit(Group[Kind]):
    """What was done in the organization, by whom."""

    list = listing(audit.list_audit)
    page = method(audit.list_audit)
    verify = method(audit.verify_audit)
    export = method(audit.export_audit)


class Platform(Group[Kind]):
    """The platform itself, for its operators."""

    audit_log = listing(audit.list_platform_audit)
    audit_page = method(audit.list_platform_audit)
    orgs = listing(platform.list_orgs)
    org_page = method(platform.list_orgs)
    create_org = method(platform.create_org)
    get_org = method(platform.get_platform_org)
    change_org = method(platform.change_platform_org)
    put_limit = method(limits.put_platform_limit)
    delete_limit = method(limits.delete_platform_limit)
    brakes = listing(limits.list_platform_brakes)
    release = method(limits.delete_platform_brake)
    recorded_runs = listing(limits.list_platform_recorded_runs)
    saturation = listing(limits.list_platform_saturation)
    limits = listing(limits.list_platform_limits)
    operators = listing(platform.list_operators)
    add_operator = method(platform.add_operator)
    remove_operator = method(platform.remove_operator)
    plans = listing(quotas.list_plans)
    put_plan = method(quotas.put_plan)
    delete_plan = method(quotas.delete_plan)
    org_quotas = method(quotas.get_org_quotas)
    set_org_plan = method(quotas.set_org_plan)
    prices = listing(quotas.list_prices)
    put_price = method(quotas.put_price)
    delete_price = method(quotas.delete_price)


class Usage(Group[Kind]):
    """What the organization used, and what it is limited to."""

    get = method(quotas.get_usage)
    quotas = method(quotas.get_quotas)


class Groups(Generic[Kind]):
    """All groups of a client of one kind."""

    def _open(self, client: Sends) -> None:
        self.runs: Runs[Kind] = Runs(client)
        self.inputs: Inputs[Kind] = Inputs(client)
        self.flows: Flows[Kind] = Flows(client)
        self.queues: Queues[Kind] = Queues(client)
        self.org: Org[Kind] = Org(client)
        self.members: Members[Kind] = Members(client)
        self.roles: Roles[Kind] = Roles(client)
        self.invitations: Invitations[Kind] = Invitations(client)
        self.service_principals: ServicePrincipals[Kind] = ServicePrincipals(client)
        self.api_keys: ApiKeys[Kind] = ApiKeys(client)
        self.secrets: Secrets[Kind] = Secrets(client)
        self.grants: Grants[Kind] = Grants(client)
        self.issuers: Issuers[Kind] = Issuers(client)
        self.platform: Platform[Kind] = Platform(client)
        self.pauses: Pauses[Kind] = Pauses(client)
        self.limits: Limits[Kind] = Limits(client)
        self.workers: Workers[Kind] = Workers(client)
        self.schedules: Schedules[Kind] = Schedules(client)
        self.triggers: Triggers[Kind] = Triggers(client)
        self.events: Events[Kind] = Events(client)
        self.auth: Auth[Kind] = Auth(client)
        self.me: Me[Kind] = Me(client)
        self.audit: Audit[Kind] = Audit(client)
        self.usage: Usage[Kind] = Usage(client)
        self.knowledge: Knowledge[Kind] = Knowledge(client)
