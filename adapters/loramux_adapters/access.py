"""Whose things somebody may see and change. Knows nothing of keys; who somebody is, the server finds out.

An owner is a tenant's name. What has the owner "" is shared: everybody sees it, only the operator changes it. The operator
is whoever acts under "" himself: he sees and changes everything, and what he makes is shared.
"""

from __future__ import annotations

from dataclasses import dataclass

from loramux_adapters.errors import AccessDenied, NameTaken

SHARED = ""


@dataclass(frozen=True, slots=True)
class Access:
    """`owner` is who acts, and whose whatever he makes will be."""

    owner: str = SHARED

    @property
    def is_operator(self) -> bool:
        return self.owner == SHARED

    def owns(self, owner: str) -> bool:
        """May he change it, and see it where nothing is shared?"""
        return self.is_operator or owner == self.owner

    def sees(self, owner: str) -> bool:
        return self.owns(owner) or owner == SHARED

    def check_change(self, name: str, owner: str) -> None:
        """Raises NameTaken for what he cannot see, AccessDenied for what is shared."""
        if self.owns(owner):
            return
        if self.sees(owner):
            raise AccessDenied(
                f"name: '{name}' is shared by everybody here; only an admin key may change or delete it",
                param="name",
            )
        raise NameTaken(f"name: '{name}' is taken; choose another name", param="name")


OPERATOR = Access()
