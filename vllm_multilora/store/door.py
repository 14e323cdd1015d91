"""Accepts clients: only processes of this user, and only while there are descriptors."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import struct

from vllm_multilora.store.protocol.channel import Channel, ChannelClosedError
from vllm_multilora.store.protocol.messages import FromClient, Refused
from vllm_multilora.store.protocol.store_folder import StoreAddress

logger = logging.getLogger(__name__)


class Door:
    """Takes in clients.

    Args:
        listener: A listening socket; owned by the door.
    """

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._address = StoreAddress.of(listener)
        listener.setblocking(False)
        # Where this process is at its limit of descriptors, this one is given up to say so.
        self._reserve = socket.socket(socket.AF_UNIX)

    def fileno(self) -> int:
        """For selectors."""
        return self._listener.fileno()

    def accept(self) -> Channel[FromClient] | None:
        """A client that has come; None if that was nobody to be served."""
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._refuse_for_descriptors()
            return None
        if not _is_same_user(sock):
            sock.close()
            return None
        sock.setblocking(False)
        return Channel(sock, FromClient)

    def close(self) -> None:
        """Nobody comes in any more; the next store can have the place."""
        self._address.close()
        self._listener.close()
        self._reserve.close()

    def _refuse_for_descriptors(self) -> None:
        """Takes one connection by the descriptor kept for this, to say why it is not served."""
        self._reserve.close()
        reason = "the store has no descriptor left; raise its limit of open files (ulimit -n)"
        logger.error(reason)
        with contextlib.suppress(OSError, ChannelClosedError):
            sock, _ = self._listener.accept()
            channel: Channel[FromClient] = Channel(sock, FromClient)
            with contextlib.closing(channel):
                channel.send(Refused(reason))
        with contextlib.suppress(OSError):
            self._reserve = socket.socket(socket.AF_UNIX)


def _is_same_user(sock: socket.socket) -> bool:
    """Whether the process at the other end of a local socket belongs to this process's user."""
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, user, _ = struct.unpack("3i", data)
    return user in (os.geteuid(), 0)
