"""The keys of an API server and whose they are; the middleware asks here for every request."""

from __future__ import annotations

import asyncio
import logging
import operator
import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from vllm import envs

from vllm_multilora.config import MultiLoRAConfig
from vllm_multilora.documents import DocumentError, WatchedFile, read_file
from vllm_multilora.errors import ConfigError
from vllm_multilora.integration.attached import Attached
from vllm_multilora.integration.server.activation import is_enabled
from vllm_multilora.integration.server.callers import Caller
from vllm_multilora.tenants.keys import (
    ADMIN_KEY_VARIABLE,
    MAX_KEY_LENGTH,
    UNGUARDED,
    KeyRing,
    can_be_sent,
    digest_of,
    has_keys,
    is_stored,
    key_in,
)
from vllm_multilora.tenants.limits import Account
from vllm_multilora.tenants.parsing import parse_tenants
from vllm_multilora.tenants.rules import Locks, Role

if TYPE_CHECKING:
    from vllm_multilora.tenants.tenant import Tenants

logger = logging.getLogger(__name__)

ACCESS: Attached[Access] = Attached("access")
"""The keys and tenants of an API server's application; not set where it has neither."""

SALT_VARIABLE = "MULTILORA_CACHE_SALT"
"""Tells the API servers of one `vllm serve` the secret of their tenants' salts."""
COUNT_VARIABLE = "MULTILORA_API_SERVERS"
"""Tells them how many they are."""

REFRESH_S = 1.0
"""Between two looks at the files of keys."""

MIN_ADMIN_KEY = 16

_IN_FORCE: WeakSet[Access] = WeakSet()
"""What guards this process's server."""


@dataclass(frozen=True)
class Identity:
    """Whose a key is.

    Attributes:
        role: What the key makes of its owner.
        tenant: The tenant's name; None for everybody else.
    """

    role: Role
    tenant: str | None = None


class Access:
    """The keys of one API server, and its tenants; used on its event loop only.

    Args:
        api_keys: vLLM's.
        admin_keys: The operators', where they have no file.
        admin_path: The file of the operators' keys; None where there is none.
        tenants_path: The tenants file; None where there are no tenants.
        folders: What only operators may see named.
        secret: Of the tenants' salts, where the file has none.
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
        self._accounts: dict[str, Account] = {}
        self._watching: asyncio.Task[None] | None = None
        self._admin: WatchedFile[list[str]] | None = None
        self._file: WatchedFile[Tenants] | None = None
        if admin_path is not None:
            self._admin = WatchedFile(admin_path, self._parse_admin, "admin keys")
        if tenants_path is not None:
            self._file = WatchedFile(tenants_path, self._parse, "tenants")
        self._take()

    def caller(self, key: str | None) -> Caller:
        """Who has a key; a stranger where it is nobody's, or there is none."""
        identity = None if key is None else self._ring.owner(key)
        if identity is None:
            identity = Identity(Role.STRANGER)
        account = None if identity.tenant is None else self._accounts[identity.tenant]
        hides = not self.locks.shows_folders(identity.role)
        return Caller(identity.role, self._folders, hides, account, self._salt)

    def tenants_now(self) -> list[dict[str, Any]]:
        """What each tenant uses in this API server, and what it may use in all of them together."""
        return [
            {
                "id": name,
                "object": "tenant",
                "running": account.running,
                "waiting": account.waiting,
                "adapters": account.adapters_in_use,
                "weight": account.tenant.weight,
                "limits": asdict(account.tenant.limits),
            }
            for name, account in sorted(self._accounts.items())
            if name in self._tenants
        ]

    def stop(self) -> None:
        """Lets no tenant's call wait for its turn any more."""
        for account in self._accounts.values():
            account.stop()

    def watch(self) -> None:
        """Has the files looked at every second from now on; on the event loop, more than once."""
        if self._watching is None and (self._admin or self._file):
            self._watching = asyncio.create_task(self._read_again())

    async def _read_again(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_S)
            try:
                for file in self._files():
                    await file.refresh_aside()
            except RuntimeError as error:  # no thread could be started
                logger.error("The keys stay as they were for now: %s", error)
            if any(map(operator.is_not, self._values(), self._in_force)):
                self._take()

    def _files(self) -> list[WatchedFile[Any]]:
        return [file for file in (self._admin, self._file) if file is not None]

    def _values(self) -> list[Any]:
        """What the files say."""
        return [file.value for file in self._files()]

    def _take(self) -> None:
        """Puts in force what the files say now.

        Tenants that it names no more keep their accounts while there is anything in them: they may
        be back before their calls end, and what they have used counts then.
        """
        self._in_force = self._values()
        tenants = self._file.value if self._file is not None else None
        self._tenants = tenants.by_name if tenants is not None else {}
        for name, tenant in self._tenants.items():
            if name in self._accounts:
                self._accounts[name].update(tenant)
            else:
                self._accounts[name] = Account(tenant, self._servers)
        for name in self._accounts.keys() - self._tenants.keys():
            if self._accounts[name].is_idle:
                del self._accounts[name]
        keys = tenants.keys if tenants is not None else {}
        self._ring = KeyRing(
            {**{key: Identity(Role.TENANT, name) for key, name in keys.items()}, **self._fixed()}
        )
        own = tenants.cache_salt if tenants is not None else None
        self._salt = self._secret if own is None else own

    def _fixed(self) -> dict[bytes, Identity]:
        """Whose the keys are that no tenant has, by their digests."""
        # Without an admin key, vLLM's is what operators have.
        role = Role.CLIENT if self.locks.admin_key else Role.OPERATOR
        admin_keys = self._admin_keys if self._admin is None else self._admin.value
        return {
            **{digest_of(key): Identity(role) for key in self._api_keys},
            **{digest_of(key): Identity(Role.OPERATOR) for key in admin_keys},
        }

    def _parse_admin(self, file: str, text: str) -> list[str]:
        keys = parse_admin_keys(file, text)
        tenants = {} if self._file is None else self._file.value.keys
        for digest in map(digest_of, keys):
            if digest in tenants:
                raise DocumentError(
                    f"{file}: found a key that is also the tenant {tenants[digest]!r}'s, expected "
                    f"a different one"
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


def read_admin_keys(settings: MultiLoRAConfig, environment: Mapping[str, str]) -> list[str]:
    """The operators' keys: those in their file, or the variable's value.

    Raises:
        ConfigError: The file cannot be read or holds no key, or one is short, a hash or cannot be
            sent.
    """
    if settings.admin_key_file is not None:
        return read_file(settings.admin_key_file, parse_admin_keys, "admin keys")
    found = key_in(environment)
    return parse_admin_keys(ADMIN_KEY_VARIABLE, found) if found else []


def parse_admin_keys(where: str, text: str) -> list[str]:
    """Operators' keys: every line that is not empty.

    Args:
        where: The file's name, for messages, which never show a key.
        text: What it holds.

    Raises:
        DocumentError: There is no key, or one is short, a hash or cannot be sent.
    """
    lines = map(str.strip, text.removeprefix("\ufeff").splitlines())
    if not (found := [line for line in lines if line]):
        raise DocumentError(f"{where}: found no admin key, expected one per line")
    if any(len(key) < MIN_ADMIN_KEY for key in found):
        raise DocumentError(
            f"{where}: found an admin key of fewer than {MIN_ADMIN_KEY} characters, expected a "
            f"random one (vllm-multilora tenants new makes one)"
        )
    if any(map(is_stored, found)):
        raise DocumentError(
            f"{where}: found a key's hash, expected keys alone, as in the first line of what "
            f"vllm-multilora tenants new prints"
        )
    if not all(map(can_be_sent, found)):
        raise DocumentError(
            f"{where}: found an admin key that HTTP cannot carry, expected up to {MAX_KEY_LENGTH} "
            f"printable ASCII characters"
        )
    return found


def settings_in(args: Namespace) -> MultiLoRAConfig | None:
    """The settings in a server's arguments; None where the plugin does not act."""
    settings = _settings_given(args)
    return settings if getattr(args, "enable_lora", False) and is_enabled(settings) else None


def require_no_keys(args: Namespace) -> None:
    """Refuses keys in the arguments of a server where the plugin does not act.

    Where there is no engine (`vllm launch render`), nobody has looked at them before.

    Raises:
        ConfigError: There are keys.
    """
    if has_keys(_settings_given(args)):
        raise ConfigError(UNGUARDED)


def _settings_given(args: Namespace) -> MultiLoRAConfig:
    additional = getattr(args, "additional_config", None)
    return MultiLoRAConfig.from_additional_config(
        additional if isinstance(additional, Mapping) else None
    )


def access_for(args: Namespace) -> Access | None:
    """What guards a server with these arguments; None where it has no keys."""
    settings = settings_in(args)
    if settings is None:
        return None
    api_keys = [key for key in (getattr(args, "api_key", None) or [envs.VLLM_API_KEY]) if key]
    access = Access(
        api_keys=api_keys,
        admin_keys=read_admin_keys(settings, os.environ),
        admin_path=settings.admin_key_file,
        tenants_path=settings.tenants,
        folders=_as_named(*settings.allowed_roots, *settings.adapter_dir),
        secret=os.environ.get(SALT_VARIABLE, ""),
        servers=int(os.environ.get(COUNT_VARIABLE, "1")),
    )
    _tell(access.locks)
    if not access.locks.any:
        return None
    _IN_FORCE.add(access)
    return access


def stop_waiting() -> None:
    """Ends what waits for its turn: the engine is being stopped, and the server waits for all."""
    for access in _IN_FORCE:
        access.stop()


def _as_named(*folders: str) -> tuple[str, ...]:
    """Folders as messages name them: by their absolute paths, and by where links lead."""
    paths = (*map(os.path.abspath, folders), *map(os.path.realpath, folders))
    return tuple(dict.fromkeys(paths))


def _tell(locks: Locks) -> None:
    if envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING and not locks.admin_key:
        who = "Everybody with the API key" if locks.api_key else "Everybody"
        if locks.tenants and not locks.api_key:
            who = "Nobody"
        logger.warning(
            "%s can load and unload adapters: there is no admin key "
            "(--multilora-admin-key-file or MULTILORA_ADMIN_KEY).",
            who,
        )
