"""A bound of processor time for chat templates, which are strangers' programs: Jinja's sandbox lets them loop.

A template is tried before it is served (serving/template_trial.py), but it can loop on a dialogue of a client's alone,
and rendering is part of the process that serves all others. What takes long in one step, as a product of a text and a
large number does, is not bounded here.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

CPU_LIMIT_S = 2.0  # a template takes a millisecond for a dialogue, a few hundred for one of megabytes


class Deadline(threading.local):
    """When the rendering of this thread has to be done, by the thread's own clock of processor time, in seconds."""

    at = 0.0


DEADLINE = Deadline()


class BoundedTemplate(Template):
    """A template whose renderings each have a deadline."""

    def new_context(self, *arguments: Any, **options: Any) -> Context:
        DEADLINE.at = time.thread_time() + CPU_LIMIT_S
        return super().new_context(*arguments, **options)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, whose templates look at the clock in each step of a loop and each call of a macro."""

    template_class = BoundedTemplate

    def check_deadline(self) -> bool:
        """True; raises TemplateError when the time is over."""
        if time.thread_time() > DEADLINE.at:
            raise TemplateError(f"it was not done after {CPU_LIMIT_S:g} s of processor time")
        return True

    def _generate(self, source: nodes.Template, *arguments: Any, **options: Any) -> str:
        check = nodes.Call(nodes.EnvironmentAttribute("check_deadline"), [], [], None, None)
        for node in source.find_all((nodes.For, nodes.Macro)):
            assert isinstance(node, nodes.For | nodes.Macro)
            if isinstance(node, nodes.For) and node.test is not None:  # what it leaves out takes time, too
                node.test = nodes.And(check, node.test, lineno=node.lineno)
            node.body.insert(0, nodes.ExprStmt(check, lineno=node.lineno))
        return super()._generate(source, *arguments, **options)


def bound_templates() -> None:
    """Give the chat templates that Transformers renders, for its users too, that bound."""
    from transformers.utils import chat_template_utils

    chat_template_utils.ImmutableSandboxedEnvironment = BoundedEnvironment
