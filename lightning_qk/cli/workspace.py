"""The command ``lightning-qk wandb-workspace``."""

from typing import Any

from lightning_qk.cli._arguments import Failure, OneLineParser
from lightning_qk.inspect.documents import BadInput
from lightning_qk.loggers.workspace import NAME, build_workspace, workspace_json, workspace_outline


def run(args: list[str], prog: str) -> int:
    """Make a workspace in a project of W&B's, or show what would be made.

    Returns:
        The exit status: 0.

    Raises:
        BadInput: a wrong command line; status 1 where W&B did not take it.
    """
    options = parser(prog).parse(args)
    entity, slash, project = options.project.partition("/")
    if not (entity and slash and project) or "/" in project:
        raise BadInput(
            f"expected ENTITY/PROJECT, such as my-team/my-project, got {options.project!r}: correct it"
        )
    if options.print:
        print(workspace_outline(options.name))
        return 0
    workspace = build_workspace(entity, project, options.name)
    if options.json:
        print(workspace_json(workspace))
        return 0
    try:
        print(_save(workspace))
    except Exception as error:
        # Anything may come out of W&B: no login, no network, no such project, no right to write there.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Failure(
            f"the workspace could not be saved to {entity}/{project} ({reason[:200]}): check the network, "
            "`wandb login` and the project's name, or look at it with --print"
        ) from error
    return 0


def parser(prog: str) -> OneLineParser:
    """The options of ``lightning-qk wandb-workspace``."""
    own = OneLineParser(
        prog=prog,
        description="Make a workspace in a W&B project: charts of attention's health first, heatmaps, "
        "layers, then the rest of what the callbacks log. Whatever else the project logs follows below them.",
        epilog=f"example: {prog} my-team/my-project; needs the package wandb-workspaces, "
        'pip install "lightning-qk[wandb]", and `wandb login` to save',
    )
    own.add_argument("project", metavar="ENTITY/PROJECT", help="user or team, and the project of its runs")
    own.add_argument("--name", default=NAME, help="name of the workspace; default: %(default)s")
    show = own.add_mutually_exclusive_group()
    show.add_argument(
        "--print", action="store_true", help="list sections and charts; saves nothing, no account"
    )
    show.add_argument(
        "--json", action="store_true", help="print what would be sent; saves nothing, no account"
    )
    return own


def _save(workspace: Any) -> str:
    """Save it and return its address."""
    return str(workspace.save().url)
