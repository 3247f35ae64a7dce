"""Addresses of what can be taken along: tables as CSV, an episode as a page of its own, preferences."""

from fastapi import APIRouter

router = APIRouter(prefix="/api/export")
