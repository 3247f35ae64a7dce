"""Addresses of labelling: sets, the next pair, answers, undo, agreement."""

from fastapi import APIRouter

router = APIRouter(prefix="/api")
