"""The command line: ``recsys-ray``."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Annotated

os.environ.setdefault("RAY_DEDUP_LOGS", "0")
os.environ.setdefault("DGLBACKEND", "pytorch")

import typer
from rich.console import Console

from recsys_ray.config import BASELINES, Config, load_config
from recsys_ray.core.errors import UserError
from recsys_ray.core.progress import Progress
from recsys_ray.studies import EMBEDDING, NAMES

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Train a recommender on interaction logs and serve it. To start, call **demo-data**, then **run**, then "
    "**serve**; `make demo` does the first two. `recsys-ray COMMAND --help` explains a command and gives an example.",
)

ConfigPath = Annotated[
    Path | None, typer.Option("--config", "-c", help="YAML configuration (see configs/). Default: built-in values.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="NAME=VALUE", help="Override a field, e.g. `--set hgnn.epochs=3`. Repeatable."),
]
Force = Annotated[bool, typer.Option("--force", help="Run even if the output is up to date.")]
Baselines = Annotated[
    str | None,
    typer.Option(
        "--baselines",
        metavar="NAMES",
        help="Baselines to compare with: `all`, `default`, or comma-separated names from "
        + ", ".join(BASELINES)
        + ". Each is tuned on the validation period (`evaluate.trials`); `all` takes hours on large data.",
    ),
]
Seeds = Annotated[
    int, typer.Option("--seeds", min=1, help="Number of training seeds, counted up from the configured one.")
]
BundlePath = Annotated[
    str, typer.Option("--bundle", "-b", help="A bundle, or a run's `bundles/current`. May be a URI.")
]


def _example(command: str) -> str:
    """The last line of a command's help."""
    return f"Example: `{command}`"


@contextmanager
def _config(path: Path | None, overrides: list[str] | None, baselines: str | None = None) -> Iterator[Config]:
    """The configuration, with a local ``run_dir``."""
    from recsys_ray.stages.chain import at_work

    chosen = [f"evaluate.baselines={baselines}"] if baselines is not None else []
    with at_work(load_config(path, [*(overrides or []), *chosen]), Progress()) as config:
        yield config


@app.command(
    "demo-data",
    rich_help_panel="Start here",
    epilog=_example("recsys-ray demo-data --out data/demo-20000 --events 20000"),
)
def demo_data(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the tables.")] = Path("data/demo"),
    events: Annotated[
        int, typer.Option(min=2000, help="Number of interactions, up to hundreds of millions.")
    ] = 100_000,
    seed: Annotated[int, typer.Option(help="The same seed gives the same data, bit for bit.")] = 0,
    taste_noise: Annotated[
        float,
        typer.Option(
            min=0, help="How little the users' taste vectors tell of what they like: 0 all of it, 10 nothing."
        ),
    ] = 0.4,
) -> None:
    """Generate demo data: a year of events of users with tastes, on audiobooks, podcasts and music."""
    from recsys_ray.cluster.session import ray_session
    from recsys_ray.config import RayConfig
    from recsys_ray.demo.world import spec_for
    from recsys_ray.demo.write import write_demo

    progress = Progress()
    spec = spec_for(events, seed, taste_noise)
    world = out / "world.json"
    if world.exists() and json.loads(world.read_text(encoding="utf-8")).get("spec") == asdict(spec):
        progress.say(f"demo data: up to date in {out}")
        return
    with ray_session(RayConfig()):
        facts = write_demo(out, spec, progress)
    progress.say(f"demo data in {out}: {facts}" if len(str(facts)) < 200 else f"demo data in {out}")


@app.command(rich_help_panel="Start here", epilog=_example("recsys-ray run --config my.yaml --set two_tower.epochs=20"))
def run(
    config: ConfigPath = None,
    overrides: Overrides = None,
    baselines: Baselines = None,
    force: Force = False,
    seeds: Seeds = 1,
    examples: Annotated[int, typer.Option(min=0, help="Example users to show, with history and recommendations.")] = 1,
) -> None:
    """Run all stages that are not up to date, and show the results.

    After an interruption, run the same command again: it continues at the last finished stage or epoch. With several
    seeds, the table shows their mean with intervals over users and seeds, and the bundle comes from the first seed.
    """
    from pipelines.show import show_results
    from pipelines.variants import run_seeds
    from recsys_ray.stages.chain import run_all

    with _config(config, overrides, baselines) as chosen:
        if seeds == 1:
            run_all(chosen, Progress(), force)
        else:
            run_seeds(chosen, seeds, Progress(), force)
        show_results(chosen, examples)


def _add_stage(name: str, summary: str) -> None:
    example = _example(f"recsys-ray {name} --config my.yaml")

    @app.command(name, rich_help_panel="One stage at a time", help=summary, epilog=example)
    def stage(config: ConfigPath = None, overrides: Overrides = None, force: Force = False) -> None:
        from recsys_ray.stages.chain import run_one

        with _config(config, overrides) as chosen:
            run_one(name, chosen, Progress(), force)


for _name, _summary in {
    "ingest": "Validate the tables, quarantine bad rows with file, row and reason, and split by time.",
    "featurize": "Encode the items' texts. Only new or changed texts are encoded.",
    "graph": "Build the item graph from co-interactions and split it into DGL partitions.",
    "hgnn": "Train the HGNN on the partitions and embed every item, including items without edges.",
    "two-tower": "Train the user tower and the item tower.",
    "index": "Index the item vectors and publish a bundle for serving.",
}.items():
    _add_stage(_name, _summary)


@app.command(
    rich_help_panel="One stage at a time", epilog=_example("recsys-ray evaluate --config my.yaml --baselines all")
)
def evaluate(
    config: ConfigPath = None, overrides: Overrides = None, baselines: Baselines = None, force: Force = False
) -> None:
    """Evaluate the model and its baselines on the test period; write metrics.json, tuning.json and report.html.

    Baselines are tuned first, all with the same number of trials. Their trials and rankings are cached in
    `run_dir/cache/evaluation`, so a change of the method ranks only the method again.
    """
    from pipelines.show import show_table
    from recsys_ray.stages.chain import run_one

    with _config(config, overrides, baselines) as chosen:
        run_one("evaluate", chosen, Progress(), force)
        show_table(chosen)


@app.command(
    "check-leaks", rich_help_panel="One stage at a time", epilog=_example("recsys-ray check-leaks --config my.yaml")
)
def check_leaks(
    config: ConfigPath = None,
    overrides: Overrides = None,
    sample: Annotated[int, typer.Option(min=1, help="Number of examples, queries and items to check, each.")] = 2000,
) -> None:
    """Check that no feature of a finished run uses the future. A leak is printed, with exit code 2."""
    from pipelines.leaks import check

    with _config(config, overrides) as chosen:
        check(chosen, Progress(), sample)


@app.command(rich_help_panel="Start here", epilog=_example("recsys-ray report --config my.yaml"))
def report(
    config: ConfigPath = None,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File to write; default: `report.html` in the run's folder.")
    ] = None,
) -> None:
    """Write report.html again from a finished run, without evaluating again."""
    from pipelines.show import draw_report

    with _config(config, overrides) as chosen:
        Progress().say(f"report: {draw_report(chosen, out)}")


@app.command(rich_help_panel="Start here", epilog=_example("recsys-ray results runs/demo runs/mine"))
def results(
    runs: Annotated[list[str], typer.Argument(help="Folders of finished runs, e.g. `runs/demo`.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Markdown page to write.")] = Path("docs/results.md"),
) -> None:
    """Show the results of finished runs, and write them to a page with protocol, version, commit and command.

    In an existing page, only the part between its two markers is replaced.
    """
    from recsys_ray.report.collect import code, protocol, read_results, write_page
    from recsys_ray.report.terminal import print_results
    from recsys_ray.storage.working_copy import working_copy

    console, found = Console(highlight=False), []
    for run_dir in runs:
        with working_copy(run_dir) as folder:
            found.append(read_results(folder))
    for run in found:
        console.print(f"\n{run.name}: {protocol(run.data)}; {code(run.made_by)}", markup=False, soft_wrap=True)
        print_results(run.metrics, run.differences, console)
    write_page(out, found)
    Progress().say(f"results: {out}")


@app.command(rich_help_panel="Measure and tune", epilog=_example("recsys-ray study parts --config my.yaml --seeds 3"))
def study(
    name: Annotated[str, typer.Argument(help=", ".join(f"**{name}**" for name in NAMES))],
    config: ConfigPath = None,
    overrides: Overrides = None,
    seeds: Seeds = 1,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for page, plot and figures.")] = Path("docs/studies"),
) -> None:
    """Test a claim of the papers on your data: run variants of the configuration and compare them.

    After an interruption, run the same command again to continue. Variants are in `run_dir/variants`. **embedding**
    trains nothing: it examines the finished run in `run_dir`.
    """
    words = ["recsys-ray", "study", name, *(["--config", str(config)] if config else [])]
    words += [word for override in overrides or [] for word in ("--set", override)]
    words += ["--seeds", str(seeds)] if seeds > 1 else []
    command = shlex.join(words)
    if name == EMBEDDING and seeds > 1:
        raise UserError("the study embedding examines a finished run and trains no seeds: leave out --seeds")
    with _config(config, overrides) as chosen:
        if name == EMBEDDING:
            from pipelines.embedding import study_embedding

            study_embedding(chosen, out, command, Progress())
        else:
            from pipelines.study import run_study

            for line in run_study(name, chosen, seeds, out, command, Progress()):
                print(line)


@app.command(
    rich_help_panel="Measure and tune", epilog=_example("recsys-ray tune --config my.yaml --trials 40 --only two_tower")
)
def tune(
    config: ConfigPath = None,
    overrides: Overrides = None,
    trials: Annotated[int, typer.Option(min=1, help="Total number of finished trials, including earlier runs.")] = 30,
    out: Annotated[Path, typer.Option("--out", "-o", help="Configuration file to write.")] = Path("configs/tuned.yaml"),
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD", help="Search only fields with this prefix, e.g. `two_tower`. Repeatable."),
    ] = None,
    resume: Annotated[bool, typer.Option(help="Reuse the trials of earlier runs.")] = True,
) -> None:
    """Search for better settings with Ray Tune, on the validation period only, and write them to a configuration.

    After an interruption, run the same command again to continue.
    """
    from pipelines.tune import tune as search

    with _config(config, overrides) as chosen:
        search(chosen, trials, out, only or [], Progress(), fresh=not resume)


@app.command(
    rich_help_panel="Ask and serve",
    epilog=_example("recsys-ray recommend --bundle runs/demo/bundles/current --item podcast-0000001 --type audiobook"),
)
def recommend(
    bundle: BundlePath,
    user: Annotated[str | None, typer.Option("--user", "-u", help="User id; an unknown id is a new user.")] = None,
    item: Annotated[
        list[str] | None, typer.Option("--item", "-i", help="An item the user has just interacted with. Repeatable.")
    ] = None,
    age: Annotated[float | None, typer.Option(help="Age in years.")] = None,
    country: Annotated[str | None, typer.Option(help="Country, as in the users table.")] = None,
    item_type: Annotated[
        list[str] | None, typer.Option("--type", "-t", help="Only this item type. Repeatable.")
    ] = None,
    k: Annotated[int, typer.Option("-k", help="Number of items.")] = 10,
    exclude: Annotated[list[str] | None, typer.Option(help="An item to leave out. Repeatable.")] = None,
    language: Annotated[list[str] | None, typer.Option(help="Only items in this language. Repeatable.")] = None,
    category: Annotated[
        list[str] | None, typer.Option(help="Only items of this category. Repeatable (any of them).")
    ] = None,
    include_seen: Annotated[bool, typer.Option("--include-seen", help="Include items the user has seen.")] = False,
    diversity: Annotated[float, typer.Option(help="0 to 1: how much the items must differ.")] = 0.0,
    popularity: Annotated[float, typer.Option(help="-1 to 1: lower or raise popular items.")] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Recommend items without a server, for a known user or for anyone described by items and traits."""
    from recsys_ray.serving.filters import Filters
    from recsys_ray.serving.recommender import Recommender
    from recsys_ray.serving.requests import Question

    recommender = Recommender.load(bundle)
    question = Question(
        user_id=user,
        history=[{"item_id": i} for i in item or []] or None,
        age=age,
        country=country,
        item_types=item_type or None,
        k=k,
        exclude=exclude or (),
        filters=Filters(tuple(language or ()), tuple(category or ())),
        include_seen=include_seen,
        diversity=diversity,
        popularity=popularity,
    )
    answer = recommender.answer(question)
    if as_json:
        print(json.dumps(asdict(answer), ensure_ascii=False, default=str))
        return
    console = Console(highlight=False)
    for past in recommender.history(user) if user else []:
        console.print(f"  - {past.event} {past.item_type}: {past.title or past.item_id}", markup=False, soft_wrap=True)
    for place, found in enumerate(answer.items, 1):
        console.print(
            f"{place:>3}. {found.item_type}: {found.title}  [{found.item_id}]  {found.score:.3f}  ({found.reason})",
            markup=False,
            soft_wrap=True,
        )


@app.command(
    "batch-recommend",
    rich_help_panel="Ask and serve",
    epilog=_example(
        "recsys-ray batch-recommend --bundle runs/demo/bundles --out recommendations/monday --quota audiobook=5"
    ),
)
def batch_recommend(
    bundle: BundlePath,
    out: Annotated[str, typer.Option("--out", "-o", help="Folder to write to. May be a URI.")],
    users: Annotated[
        str | None,
        typer.Option(
            help="Parquet or CSV table with `user_id` and, if known, `age`, `country` and `history`: a list of item "
            "ids, or of `item_id`, `event` and `timestamp` (JSON in CSV). Default: all users of the bundle."
        ),
    ] = None,
    k: Annotated[int, typer.Option("-k", help="Number of items per user.")] = 10,
    item_type: Annotated[
        list[str] | None, typer.Option("--type", "-t", help="Only this item type. Repeatable.")
    ] = None,
    quota: Annotated[
        list[str] | None,
        typer.Option(metavar="TYPE=N", help="N items of this type, instead of the best k of all types. Repeatable."),
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="An item to leave out. Repeatable.")] = None,
    language: Annotated[list[str] | None, typer.Option(help="Only items in this language. Repeatable.")] = None,
    category: Annotated[
        list[str] | None, typer.Option(help="Only items of this category. Repeatable (any of them).")
    ] = None,
    without_category: Annotated[list[str] | None, typer.Option(help="No items of this category. Repeatable.")] = None,
    published_after: Annotated[
        str | None, typer.Option(metavar="TIME", help="Only items published at this time or later.")
    ] = None,
    include_seen: Annotated[bool, typer.Option("--include-seen", help="Include items the user has seen.")] = False,
    diversity: Annotated[float, typer.Option(help="0 to 1: how much the items of a user must differ.")] = 0.0,
    popularity: Annotated[float, typer.Option(help="-1 to 1: lower or raise popular items.")] = 0.0,
    reasons: Annotated[bool, typer.Option(help="Whether to write why each item is recommended.")] = True,
    address: Annotated[str, typer.Option(help="'local', or the address of a Ray cluster.")] = "local",
) -> None:
    """Recommend items for all users of a bundle, or for those of a table, and write Parquet.

    `OUT/recommendations` gets one row per user and rank: user_id, rank, item_type, item_id, score, reason, known, cold
    and version. After an interruption, run the same command again: only the missing blocks of users are computed.
    Rows of `--users` that cannot be used are in `OUT/quarantine`, with file, row and reason.
    """
    from recsys_ray.cluster.session import ray_session
    from recsys_ray.config import RayConfig
    from recsys_ray.serving.batch import batch_recommend as run_it
    from recsys_ray.serving.filters import Filters
    from recsys_ray.serving.requests import Question

    question = Question(
        k=k,
        item_types=item_type or None,
        quotas=_quotas(quota) if quota else None,
        exclude=exclude or (),
        filters=Filters(
            languages=tuple(language or ()),
            categories_any=tuple(category or ()),
            categories_none=tuple(without_category or ()),
            published_after=None if published_after is None else _moment("--published-after", published_after),
        ),
        include_seen=include_seen,
        diversity=diversity,
        popularity=popularity,
    )
    with ray_session(RayConfig(address=address)) as cpus:
        run_it(bundle, out, question, Progress(), cpus, users, reasons)


def _quotas(pairs: Sequence[str]) -> dict[str, int]:
    quotas = {}
    for pair in pairs:
        name, _, count = pair.rpartition("=")
        if not name or not count.isdecimal():
            raise UserError(f"--quota {pair}: write TYPE=N, for example audiobook=5")
        quotas[name] = int(count)
    return quotas


def _moment(option: str, text: str) -> int:
    """Unix seconds."""
    from recsys_ray.data.times import parse

    moment = parse(text)
    if moment is None:
        raise UserError(f"{option} {text} is not a time; write 2024-05-01 or 2024-05-01T12:00:00Z")
    return moment


@app.command(
    rich_help_panel="Ask and serve", epilog=_example("recsys-ray serve --bundle runs/demo/bundles/current --port 8000")
)
def serve(
    bundle: BundlePath,
    host: Annotated[str, typer.Option(help="Interface to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    replicas: Annotated[int, typer.Option(min=1, help="Replicas to start with.")] = 1,
    max_replicas: Annotated[int | None, typer.Option(min=1, help="Autoscale up to this many.")] = None,
    address: Annotated[str, typer.Option(help="'local', or the address of a Ray cluster.")] = "local",
    keys: Annotated[Path | None, typer.Option(help="Require a key from this file (see make-key).")] = None,
    store: Annotated[
        str | None,
        typer.Option(help="Store live events and item changes: `sqlite:///data/live.db` or `redis://host:6379/0`."),
    ] = None,
    settings: Annotated[
        Path | None, typer.Option(help="YAML file with tokens, limits and more (docs/operations.md).")
    ] = None,
) -> None:
    """Serve a bundle over HTTP with Ray Serve until Ctrl-C: a web page at /, the API documentation at /docs.

    Without keys, the server listens on this machine only.
    """
    from serve.deployment import Scaling
    from serve.server import serve_forever
    from serve.settings import load_settings

    scaling, chosen = Scaling(replicas=replicas, max_replicas=max_replicas), load_settings(settings)
    if keys is not None:
        chosen = chosen.model_copy(update={"keys": str(keys.resolve())})
    if store is not None:
        chosen = chosen.model_copy(update={"store": store})
    serve_forever(bundle, host, port, scaling, address, progress=Progress(), settings=chosen)


@app.command(
    "make-key",
    rich_help_panel="Ask and serve",
    epilog=_example("recsys-ray make-key keys.jsonl --name shop --scope read --scope events"),
)
def make_key(
    keys: Annotated[Path, typer.Argument(help="The key file; it is created if missing.")],
    name: Annotated[str, typer.Option(help="Name of the key's holder; appears in the server's log.")],
    scope: Annotated[
        list[str] | None, typer.Option(help="What the key allows: read, events, catalogue, promote. Repeatable.")
    ] = None,
    rate: Annotated[str | None, typer.Option(help="Rate limit, e.g. `100/second`.")] = None,
) -> None:
    """Create a key for a server started with `--keys`: print it once and add its hash to the file.

    Servers notice it within a second. To revoke a key, delete its line.
    """
    from serve.security import make_key as run_it

    print(run_it(keys, name, scope or ["read"], rate))


@app.command(
    "export-events",
    rich_help_panel="Ask and serve",
    epilog=_example("recsys-ray export-events --store sqlite:///$PWD/data/live.db --out data/live"),
)
def export_events(
    store: Annotated[str, typer.Option(help="The server's store, as given to `serve --store`.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for `interactions/` and `items.parquet`.")],
) -> None:
    """Write a server's stored events and items as tables. Add them to `data.interactions` and `data.items`."""
    from pipelines.export_events import export_events as run_it

    run_it(store, out, Progress())


@app.command(
    "forget-events",
    rich_help_panel="Ask and serve",
    epilog=_example("recsys-ray forget-events --store sqlite:///$PWD/data/live.db --before 2024-05-01"),
)
def forget_events(
    store: Annotated[str, typer.Option(help="The server's store, as given to `serve --store`.")],
    before: Annotated[
        str | None, typer.Option(metavar="TIME", help="Delete events and answers before this time.")
    ] = None,
    user: Annotated[str | None, typer.Option(metavar="ID", help="Delete the events of this user.")] = None,
) -> None:
    """Delete old events, or all events of a user, from a server's store, even while it serves."""
    from serve.store import open_store

    if before is None and user is None:
        raise UserError("name what to delete: --before 2024-05-01, or --user ID")
    moment = None if before is None else _moment("--before", before)
    with closing(open_store(store, make=False)) as opened:
        count = 0 if moment is None else opened.trim(moment)
        count += 0 if user is None else opened.forget_user(user)
    Progress().say(f"{count:,} events deleted")


@app.command(rich_help_panel="Ask and serve", epilog=_example("recsys-ray promote runs/mine/bundles"))
def promote(
    bundle: Annotated[str, typer.Argument(help="A version's folder, or a folder of bundles for the newest one.")],
    force: Annotated[
        bool, typer.Option("--force", help="Accept very different answers or a worse validation score.")
    ] = False,
) -> None:
    """Switch the servers of a folder of bundles to another bundle, without a restart.

    The bundle is checked first: files, answers for its canary users, overlap with current answers, validation score.
    `recsys-ray rollback` reverts it.
    """
    from recsys_ray.bundle.release import Limits
    from recsys_ray.bundle.release import promote as run_it

    version, before = run_it(bundle, None if force else Limits())
    Progress().say(f"now serving: {version}" + (f" (before: {before})" if before else ""))


@app.command(rich_help_panel="Ask and serve", epilog=_example("recsys-ray rollback runs/mine/bundles"))
def rollback(bundles: Annotated[str, typer.Argument(help="The folder of bundles being served.")]) -> None:
    """Switch the servers of a folder of bundles back to the bundle before the last promotion."""
    from recsys_ray.bundle.release import rollback as run_it

    version, before = run_it(bundles)
    Progress().say(f"now serving: {version} (before: {before})")


@app.command(
    "embed-items",
    rich_help_panel="Embeddings",
    epilog=_example("recsys-ray embed-items new.parquet --bundle runs/mine/bundles/current"),
)
def embed_items(
    items: Annotated[
        str, typer.Argument(help="Table of new items, Parquet or CSV, with the columns of the items table.")
    ],
    bundle: BundlePath,
    interactions: Annotated[
        str | None, typer.Option("--interactions", "-i", help="Table of interactions with them so far.")
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="Folder of bundles to write to; default: the bundle's own.")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Embed again items that the bundle already has.")] = False,
    current: Annotated[
        bool, typer.Option("--current/--no-current", help="Whether to point `current` at the new bundle.")
    ] = True,
) -> None:
    """Add new items to a bundle without training, so that they can be recommended at once."""
    from recsys_ray.bundle.extend import extend_bundle
    from recsys_ray.cluster.session import granted_cpus
    from recsys_ray.storage.outputs import locate_bundle
    from recsys_ray.storage.store import Place

    started, progress = time.monotonic(), Progress()
    made = extend_bundle(bundle, items, interactions, progress, out, replace, current, granted_cpus())
    place = Place(out) if out else locate_bundle(bundle) / ".."
    link = ", and current points at it" if current else ""
    progress.say(f"    done in {time.monotonic() - started:,.0f} s -> {place / made.path.name}{link}")


@app.command(
    "export-embeddings",
    rich_help_panel="Embeddings",
    epilog=_example("recsys-ray export-embeddings --config my.yaml --out items.parquet"),
)
def export_embeddings(
    out: Annotated[Path, typer.Option("--out", "-o", help="Parquet file to write.")],
    config: ConfigPath = None,
    overrides: Overrides = None,
    run_dir: Annotated[str | None, typer.Option("--run", help="A run's folder, instead of the configured one.")] = None,
    bundle: Annotated[
        str | None, typer.Option("--bundle", "-b", help="A bundle instead of a run; includes items added later.")
    ] = None,
    snapshot: Annotated[str, typer.Option(help="Snapshot: serve, test, valid, cut0, ...")] = "serve",
    vectors: Annotated[str, typer.Option(help="Comma-separated choice of text, hgnn and tower.")] = "text,hgnn,tower",
) -> None:
    """Write ids, types, titles and vectors of all items into one Parquet file."""
    from recsys_ray.bundle.export import export_bundle, export_run
    from recsys_ray.storage.working_copy import working_copy

    progress, kinds = Progress(), [name.strip() for name in vectors.split(",")]
    if bundle is None:
        with working_copy(run_dir or load_config(config, overrides or []).run_dir, progress.say) as folder:
            items = export_run(Path(folder), out, snapshot, kinds, progress)
    elif snapshot == "serve":
        items = export_bundle(bundle, out, kinds, progress)
    else:
        raise UserError("a bundle has only the snapshot 'serve'; use --run or --config for another one")
    progress.say(f"{items:,} items with {', '.join(kinds)} -> {out} ({out.stat().st_size / 1e6:,.1f} MB)")


@app.command(rich_help_panel="Embeddings", epilog=_example("recsys-ray probe --config my.yaml"))
def probe(config: ConfigPath = None, overrides: Overrides = None, force: Force = False) -> None:
    """Measure how well the embeddings predict category, language and future co-interactions, compared with text."""
    from pipelines.probe import run_probe

    with _config(config, overrides) as chosen:
        run_probe(chosen, Progress(), force)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does: Ray's processes end, and what is finished stays."""

    status = 0

    def terminate(number: int, frame: FrameType | None) -> None:
        nonlocal status
        status = 128 + number  # what a shell says of a process that a signal has ended
        print("terminated", file=sys.stderr)
        raise SystemExit(status)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except SystemExit as end:  # Ray passes it on with a status of its own
        raise SystemExit(status or end.code) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. A user error is one sentence and exit code 2; anything else is a bug and keeps its traceback."""
    try:
        with _terminable():
            app(args=list(arguments) if arguments is not None else None)
    except UserError as error:
        Console(stderr=True, highlight=False).print(f"error: {error}", markup=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
