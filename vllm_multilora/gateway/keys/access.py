"""Finds out whose a key is; the middleware asks here for every request."""

from __future__ import annotations

import asyncio
import logging
import operator
import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from vllm_multilora.adapters.files.missing_files import is_url
from vllm_multilora.documents import DocumentError, WatchedFile
from vllm_multilora.integration.seals import SECRET_VARIABLE
from vllm_multilora.integration.server.requests.callers import Caller
from vllm_multilora.integration.server.settings.gateway_activation import settings_in
from vllm_multilora.integration.server.settings.start_checks import (
    COUNT_VARIABLE,
    api_keys_in,
    parse_admin_keys,
    read_admin_keys,
    warn_of_open_updates,
)
from vllm_multilora.metrics.server_counts import COUNTS
from vllm_multilora.tenants.keys import KeyRing, digest_of
from vllm_multilora.tenants.limits import Account
from vllm_multilora.tenants.rules import Locks, Role
from vllm_multilora.tenants.tenant import Tenants
from vllm_multilora.tenants.tenants_file import parse_tenants

logger = logging.getLogger(__name__)

REFRESH_S = 1.0
"""Between two looks at the files of keys."""


_Owner = tuple[Role, str | None]
"""What a key makes of its owner, and the tenant's name; None for everybody else."""


class Access:
    """The keys of one API server, and its tenants; used on its event loop only.

    Args:
        api_keys: vLLM's; its own check accepts the first, `forwarded_key`.
        admin_keys: The operators', where they have no file.
        admin_path: The file of the operators' keys; None where there is none.
        tenants_path: The tenants file; None where there are no tenants.
        folders: What only operators may see named.
        secret: Of this start of the server: of all seals, and of the tenants' salts where the file
            has none.
        servers: How many API servers share the tenants' limits.

    Raises:
        DocumentError: A file of keys cannot be used.
    """

    def __init__(
        self,
        *,
        api_keys: Sequence[str] = (),
        admin_keys: Sequence[str] = (),
        admin_path: str | None = None,
        tenants_path: str | None = None,
        folders: Sequence[str] = (),
        secret: str = "",
        servers: int = 1,
    ) -> None:
        has_admin = bool(admin_keys) or admin_path is not None
        self.locks = Locks(bool(api_keys), has_admin, tenants_path is not None)
        self._folders = folders
        self._secret = secret
        self._servers = servers
        self._api_keys, self._admin_keys = api_keys, admin_keys
        self.forwarded_key = api_keys[0] if api_keys else None
        self._accounts: dict[str, Account] = {}
        self._watching: asyncio.Task[None] | None = None
        self._admin: WatchedFile[list[str]] | None = None
        self._file: WatchedFile[Tenants] | None = None
        if admin_path is not None:
            self._admin = WatchedFile(admin_path, self._parse_admin, "admin keys")
        if tenants_path is not None:
            self._file = WatchedFile(tenants_path, self._parse, "tenants")
        self._files = [file for file in (self._admin, self._file) if file is not None]
        self._take()

    def caller(self, key: str | None) -> Caller:
        """The owner of a key; a stranger where it is nobody's, or there is none."""
        owner = None if key is None else self._ring.owner(key)
        role, tenant = owner or (Role.STRANGER, None)
        account = None if tenant is None else self._accounts[tenant]
        hides = not self.locks.shows_folders(role)
        return Caller(role, self._folders, hides, account, self._salt, seal_secret=self._secret)

    def tenants_now(self) -> list[dict[str, Any]]:
        """What each tenant uses in this API server, and what it may use in all of them together."""
        return [
            {
                "id": name,
                "object": "tenant",
                "running": account.running,
                "waiting": account.waiting,
                "adapters": account.adapters_in_use,
                "tokens": None if (used := account.tokens_used) is None else round(used),
                "weight": account.tenant.weight,
                "limits": asdict(account.tenant.limits),
            }
            for name, account in sorted(self._accounts.items())
            if name in self._tenants
        ]

    def watch(self) -> None:
        """Has the files looked at every second from now on; on the event loop, more than once."""
        if self._watching is None and self._files:
            self._watching = asyncio.create_task(self._read_again())

    async def _read_again(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_S)
            try:
                for file in self._files:
                    await file.refresh_on_thread()
            except RuntimeError as error:  # no thread could be started
                logger.error("The keys stay as they were for now: %s", error)
            if any(map(operator.is_not, self._values(), self._in_force)):
                self._take()

    def _values(self) -> list[Any]:
        return [file.value for file in self._files]

    def _take(self) -> None:
        """Puts in force what the files say now.

        Tenants that it names no more keep their accounts while there is anything in them: they may
        be back before their calls end, and what they have used counts then.
        """
        self._in_force = self._values()
        tenants = Tenants({}, {}) if self._file is None else self._file.value
        self._tenants = tenants.by_name
        for name, tenant in self._tenants.items():
            if name in self._accounts:
                self._accounts[name].update(tenant)
            else:
                account = Account(tenant, self._servers, on_charge=COUNTS.count_limited)
                self._accounts[name] = account
        for name in self._accounts.keys() - self._tenants.keys():
            if self._accounts[name].is_idle:
                del self._accounts[name]
        owners = {key: (Role.TENANT, name) for key, name in tenants.keys.items()}
        self._ring = KeyRing[_Owner]({**owners, **self._fixed()})
        self._salt = self._secret if tenants.cache_salt is None else tenants.cache_salt

    def _fixed(self) -> dict[bytes, _Owner]:
        """Owners of the keys that belong to no tenant, by the keys' digests."""
        # Without an admin key, vLLM's is what operators have.
        role = Role.CLIENT if self.locks.admin_key else Role.OPERATOR
        admin_keys = self._admin_keys if self._admin is None else self._admin.value
        roles = {**dict.fromkeys(self._api_keys, role), **dict.fromkeys(admin_keys, Role.OPERATOR)}
        return {digest_of(key): (role, None) for key, role in roles.items()}

    def _parse_admin(self, file: str, text: str) -> list[str]:
        keys = parse_admin_keys(file, text)
        tenants = {} if self._file is None else self._file.value.keys
        for digest in tenants.keys() & map(digest_of, keys):
            raise DocumentError(
                f"{file}: found a key that is also the tenant {tenants[digest]!r}'s, expected a "
                f"different one"
            )
        return keys

    def _parse(self, file: str, text: str) -> Tenants:
        tenants = parse_tenants(file, text)
        for digest in tenants.keys.keys() & self._fixed().keys():
            raise DocumentError(
                f"{file}: found a key of the tenant {tenants.keys[digest]!r} that is also the "
                f"server's admin key or API key, expected a different one"
            )
        return tenants


def access_for(args: Namespace) -> Access | None:
    """What guards a server with these arguments; None where it has no keys."""
    settings = settings_in(args)
    if settings is None:
        return None
    access = Access(
        api_keys=api_keys_in(args),
        admin_keys=read_admin_keys(settings, os.environ),
        admin_path=settings.admin_key_file,
        tenants_path=settings.tenants,
        folders=_as_named(*settings.allowed_roots, *settings.adapter_dir),
        secret=os.environ.get(SECRET_VARIABLE, ""),
        servers=int(os.environ.get(COUNT_VARIABLE, "1")),
    )
    warn_of_open_updates(access.locks)
    return access if access.locks.any else None


def _as_named(*roots: str) -> tuple[str, ...]:
    """Folders as messages name them: by their absolute paths, and by where links lead; and URLs."""
    folders = [root for root in roots if not is_url(root)]
    paths = (*map(os.path.abspath, folders), *map(os.path.realpath, folders))
    return tuple(dict.fromkeys((*paths, *filter(is_url, roots))))
