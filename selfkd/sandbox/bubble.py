"""Namespaces by bubblewrap (github.com/containers/bubblewrap), for hosts that let it make them and us not.

It is the case where AppArmor restricts user namespaces and has a profile for bwrap, or where bwrap is set-user-ID. It sets
neither resource limits nor Landlock, so a second stage inside does, which costs the start of one more interpreter.
"""

from __future__ import annotations

import os
import sys

from selfkd.sandbox.walls import DEVICES, WORK, Site

STAGE = "import sys; sys.path.append(sys.argv[2]); from selfkd.sandbox.warden import staged; staged(sys.argv[1])"
PACKAGE = os.path.dirname(os.path.realpath(__file__))
ROOT = os.path.dirname(os.path.dirname(PACKAGE))
OPTIONS = ("--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--hostname", "sandbox")


def enter(site: Site, settings: str, disk: int) -> None:
    """Become bwrap, which starts `warden.staged` in the new world. Descriptors 0 to 5 go along; the 6th is not needed."""
    for handle in (4, 5):
        os.set_inheritable(handle, True)
    shown = [*dict.fromkeys((*site.view, PACKAGE, f"{ROOT}/selfkd/__init__.py"))]
    binds = [word for path in shown for word in _show(path)]
    devices = [word for path in DEVICES for word in ("--dev-bind", path, path)]
    own = ["--size", str(disk), "--tmpfs", WORK, "--symlink", WORK, "/dev/shm", "--remount-ro", "/"]
    inner = [os.path.realpath(sys.executable), "-S", "-s", "-B", "-c", STAGE, settings, ROOT]
    options = [*OPTIONS, "--die-with-parent", "--cap-drop", "ALL", *binds, *devices, *own, "--chdir", WORK]
    os.execv(site.bubble, [site.bubble, *options, "--", *inner])


def _show(path: str) -> list[str]:
    """The words that show `path`, the links on the way to it kept as links."""
    if os.path.islink(path):
        target = os.path.normpath(os.path.join(os.path.dirname(path), os.readlink(path)))
        return ["--symlink", os.readlink(path), path, *_show(target)]
    return ["--ro-bind-try", path, path]
