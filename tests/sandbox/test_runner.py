"""What the warden is asked for, before anything runs."""

from __future__ import annotations

import sys

from selfkd.sandbox import Limits
from selfkd.sandbox.runner import Runner
from selfkd.sandbox.walls import Site

SITE = Site(tier=2, view=(), work="", abi=7)


def test_a_warm_program_is_forked_and_a_cold_one_is_started_by_a_command() -> None:
    assert Runner(SITE, Limits()).job("script")["argv"] is None
    cold = Runner(SITE, Limits(), python=sys.executable, import_path=("/shown",)).job("calls")
    assert cold["argv"] and cold["argv"][0] == sys.executable
    assert cold["argv"][-1].endswith("main('calls', ['/shown'])\n")
    node = Runner(SITE, Limits(), argv=("/usr/bin/node", "{program}.js")).job("script")
    assert node["argv"] == ["/usr/bin/node", "{program}.js"]


def test_variables_are_added_to_the_few_that_are_set() -> None:
    env = Runner(SITE, Limits(), env={"TZ": "CET", "MINE": "1"}).job("script")["env"]
    assert (env["TZ"], env["MINE"], env["HOME"]) == ("CET", "1", "/box")
