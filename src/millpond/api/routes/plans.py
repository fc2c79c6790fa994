"""Plans, plans of organizations, and prices of models.

Called by operators. Invariant: nothing here reads what an organization holds, but counts of it.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request, Response

from millpond.api.bodies import described, read_json
from millpond.api.documented import failures
from millpond.api.models import Listing
from millpond.api.models_plans import (
    PlanOut,
    PriceOut,
    PutPlan,
    QuotasOut,
    SetOrgPlan,
    SetPrice,
)
from millpond.api.reply import listing, reply
from millpond.api.routes.platform import OrgId, Reader, Writer
from millpond.api.shapes_plans import plan_json, price_json, quotas_json
from millpond.api.texts import Word
from millpond.identity import plans

router = APIRouter(prefix="/v1/platform", tags=["plans"])

Model = Annotated[Word, Path(description="The model as its provider names it in answers.")]


@router.get(
    "/plans",
    operation_id="list_plans",
    responses={200: {"model": Listing[PlanOut]}, **failures(401, 403, 503)},
)
async def list_plans(caller: Reader) -> Response:
    """List all plans by name."""
    async with caller.org() as con:
        found = await plans.list_plans(con)
    return reply(listing([plan_json(one) for one in found], has_more=False))


@router.put(
    "/plans/{name}",
    operation_id="put_plan",
    openapi_extra=described(PutPlan),
    responses={200: {"model": PlanOut}, **failures(400, 401, 403, 413, 415, 422, 503)},
)
async def put_plan(request: Request, caller: Writer, name: Word) -> Response:
    """Make or replace a plan; organizations that have it are limited so within seconds."""
    wish = await read_json(request, PutPlan)
    async with caller.org() as con:
        made = await plans.put_plan(
            con,
            caller.principal,
            name,
            wish.title,
            wish.limits,
            features=wish.features,
            is_default=wish.is_default,
            address=caller.address,
        )
    await caller.ports.reserver.refresh()
    return reply(plan_json(made))


@router.delete(
    "/plans/{name}",
    operation_id="delete_plan",
    status_code=204,
    responses={
        204: {"description": "It is gone."},
        **failures(401, 403, 404, 409, 422, 503),
    },
)
async def delete_plan(caller: Writer, name: Word) -> Response:
    """Remove a plan that no organization was given."""
    async with caller.org() as con:
        await plans.delete_plan(con, caller.principal, name, address=caller.address)
    return Response(status_code=204)


@router.get(
    "/orgs/{org_id}/quotas",
    operation_id="get_org_quotas",
    responses={200: {"model": QuotasOut}, **failures(401, 403, 404, 422, 503)},
)
async def get_org_quotas(caller: Reader, org_id: OrgId) -> Response:
    """Show an organization's plan, and what it has used of each quota."""
    async with caller.org() as con:
        found = await plans.show_org_plan(con, org_id)
    return reply(quotas_json(found))


@router.put(
    "/orgs/{org_id}/plan",
    operation_id="set_org_plan",
    openapi_extra=described(SetOrgPlan),
    responses={200: {"model": QuotasOut}, **failures(400, 401, 403, 404, 413, 415, 422, 503)},
)
async def set_org_plan(request: Request, caller: Writer, org_id: OrgId) -> Response:
    """Give an organization a plan, and limits and features that are its own; it is limited so within seconds."""
    wish = await read_json(request, SetOrgPlan)
    async with caller.org() as con:
        found = await plans.set_org_plan(
            con,
            caller.principal,
            org_id,
            wish.plan,
            wish.overrides,
            features=wish.features,
            address=caller.address,
        )
    await caller.ports.reserver.refresh()
    return reply(quotas_json(found))


@router.get(
    "/prices",
    operation_id="list_prices",
    responses={200: {"model": Listing[PriceOut]}, **failures(401, 403, 503)},
)
async def list_prices(caller: Reader) -> Response:
    """List what models cost, by model."""
    async with caller.org() as con:
        found = await plans.list_prices(con)
    return reply(listing([price_json(one) for one in found], has_more=False))


@router.put(
    "/prices/{model:path}",
    operation_id="put_price",
    openapi_extra=described(SetPrice),
    responses={200: {"model": PriceOut}, **failures(400, 401, 403, 413, 415, 422, 503)},
)
async def put_price(request: Request, caller: Writer, model: Model) -> Response:
    """Set what a model costs from now on; what was used before stays as it was counted."""
    wish = await read_json(request, SetPrice)
    async with caller.org() as con:
        made = await plans.put_price(
            con,
            caller.principal,
            model,
            wish.input_micros,
            wish.output_micros,
            address=caller.address,
        )
    return reply(price_json(made))


@router.delete(
    "/prices/{model:path}",
    operation_id="delete_price",
    status_code=204,
    responses={
        204: {"description": "It costs nothing from now on."},
        **failures(401, 403, 404, 422, 503),
    },
)
async def delete_price(caller: Writer, model: Model) -> Response:
    """Let a model cost nothing from now on."""
    async with caller.org() as con:
        await plans.delete_price(con, caller.principal, model, address=caller.address)
    return Response(status_code=204)
