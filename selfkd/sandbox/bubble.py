"""Namespaces by bubblewrap (github.com/containers/bubblewrap), for hosts that let it make them and us not.

It is the case where AppArmor restricts user namespaces and has a profile for bwrap, or where bwrap is set-user-ID. It sets
neither resource limits nor Landlock, so a second stage inside does, which costs the start of one more interpreter.
"""

from __future__ import annotations

import os
import sys

from selfkd.sandbox.walls import DEVICES, PYTHON_FLAGS, WORK_FOLDER, Site

STAGE_CODE = "import sys; sys.path.append(sys.argv[2]); from selfkd.sandbox.warden import staged; staged(sys.argv[1])"
PACKAGE = os.path.dirname(os.path.realpath(__file__))
ROOT = os.path.dirname(os.path.dirname(PACKAGE))
NAMESPACE_OPTIONS = (
    "--unshare-user",
    "--unshare-pid",
    "--unshare-net",
    "--unshare-ipc",
    "--unshare-uts",
    "--hostname",
    "sandbox",
)


def enter(site: Site, settings: str, disk: int) -> None:
    """Become bwrap, which starts `warden.staged` behind its walls. Descriptors 0 to 5 go along; the 6th is not needed."""
    for handle in (4, 5):
        os.set_inheritable(handle, True)
    shown = [*dict.fromkeys((*site.view, PACKAGE, f"{ROOT}/selfkd/__init__.py"))]
    binds = [word for path in shown for word in _shown(path)]
    devices = [word for path in DEVICES for word in ("--dev-bind", path, path)]
    own = ["--size", str(disk), "--tmpfs", WORK_FOLDER, "--symlink", WORK_FOLDER, "/dev/shm", "--remount-ro", "/"]
    inner = [os.path.realpath(sys.executable), *PYTHON_FLAGS, "-c", STAGE_CODE, settings, ROOT]
    options = [*NAMESPACE_OPTIONS, "--die-with-parent", "--cap-drop", "ALL", *binds, *devices, *own, "--chdir", WORK_FOLDER]
    os.execv(site.bubble, [site.bubble, *options, "--", *inner])


def _shown(path: str) -> list[str]:
    """Return the options that show `path`; links on the way to it stay links."""
    if os.path.islink(path):
        target = os.path.normpath(os.path.join(os.path.dirname(path), os.readlink(path)))
        return ["--symlink", os.readlink(path), path, *_shown(target)]
    return ["--ro-bind-try", path, path]
