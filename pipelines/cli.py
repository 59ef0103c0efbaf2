"""The command line: ``recsys-ray``."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("RAY_DEDUP_LOGS", "0")
os.environ.setdefault("DGLBACKEND", "pytorch")

import typer
from rich.console import Console

from recsys_ray.config import BASELINES, Config, load_config
from recsys_ray.core.errors import UserError
from recsys_ray.core.progress import Progress
from recsys_ray.studies import NAMES

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="From interaction logs to a served recommendation. New here? Call **demo-data**, then **run**, then "
    "**serve**; `make demo` does the first two. `recsys-ray VERB --help` explains a verb, with an example.",
)

ConfigPath = Annotated[
    Path | None, typer.Option("--config", "-c", help="A YAML preset (see configs/). Without it, the defaults.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="NAME=VALUE", help="Override a field, e.g. `--set hgnn.epochs=3`. Repeatable."),
]
Force = Annotated[bool, typer.Option("--force", help="Run even where the output is up to date.")]
Baselines = Annotated[
    str | None,
    typer.Option(
        "--baselines",
        metavar="NAMES",
        help="What to compare with: `all`, `default`, or names with commas between them, e.g. `item_knn,ease,ials`: "
        + ", ".join(BASELINES)
        + ". Each is tuned on the validation period (`evaluate.trials`); `all` takes hours on large data.",
    ),
]
Seeds = Annotated[
    int, typer.Option("--seeds", min=1, help="How many training seeds: the configured one and those after it.")
]
BundlePath = Annotated[str, typer.Option("--bundle", "-b", help="A bundle folder, or a run's `bundles/current`.")]


def _example(command: str) -> str:
    """The last line of a verb's help."""
    return f"Example: `{command}`"


def _config(path: Path | None, overrides: list[str] | None, baselines: str | None = None) -> Config:
    chosen = [f"evaluate.baselines={baselines}"] if baselines is not None else []
    return load_config(path, [*(overrides or []), *chosen])


@app.command(
    "demo-data",
    rich_help_panel="Start here",
    epilog=_example("recsys-ray demo-data --out data/demo-20000 --events 20000"),
)
def demo_data(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the tables.")] = Path("data/demo"),
    events: Annotated[int, typer.Option(min=2000, help="Interactions, thousands to hundreds of millions.")] = 100_000,
    seed: Annotated[int, typer.Option(help="The same seed makes the same world, bit for bit.")] = 0,
) -> None:
    """Generate the demo data: audiobooks, podcasts and music, users with tastes, a year of events."""
    from recsys_ray.cluster.session import ray_session
    from recsys_ray.config import RayConfig
    from recsys_ray.demo.world import spec_for
    from recsys_ray.demo.write import write_demo

    progress = Progress()
    spec = spec_for(events, seed)
    world = out / "world.json"
    if world.exists() and json.loads(world.read_text(encoding="utf-8")).get("spec") == _plain(spec):
        progress.say(f"demo world: up to date in {out}")
        return
    with ray_session(RayConfig()):
        facts = write_demo(out, spec, progress)
    progress.say(f"demo world in {out}: {facts}" if len(str(facts)) < 200 else f"demo world in {out}")


def _plain(spec: Any) -> Any:
    from dataclasses import asdict

    return json.loads(json.dumps(asdict(spec), default=str))


@app.command(rich_help_panel="Start here", epilog=_example("recsys-ray run --config my.yaml --set two_tower.epochs=20"))
def run(
    config: ConfigPath = None,
    overrides: Overrides = None,
    baselines: Baselines = None,
    force: Force = False,
    seeds: Seeds = 1,
    examples: Annotated[int, typer.Option(min=0, help="Users to show, with what they did and get next.")] = 1,
) -> None:
    """Run all stages, skipping those that are up to date, and show the results on one screen.

    If it is stopped or crashes, start it again: it goes on at the last finished stage or epoch. With several seeds the
    table shows their mean, with intervals over users and seeds; the bundle is the first seed's.
    """
    from pipelines.show import show_results
    from pipelines.variants import run_seeds
    from recsys_ray.stages.chain import run_all

    chosen = _config(config, overrides, baselines)
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

        run_one(name, _config(config, overrides), Progress(), force)


for _name, _summary in {
    "ingest": "Validate the tables, put bad rows into quarantine with file, row and reason, split by time.",
    "featurize": "Encode each item's text. Only new or changed texts are encoded again.",
    "graph": "Count co-interactions into a heterogeneous item graph and cut it into DGL partitions.",
    "hgnn": "Train the HGNN on the partitions and embed every item, also those without edges.",
    "two-tower": "Train the user tower and the item tower.",
    "index": "Index the item vectors and publish the bundle that serving needs.",
}.items():
    _add_stage(_name, _summary)


@app.command(
    rich_help_panel="One stage at a time", epilog=_example("recsys-ray evaluate --config my.yaml --baselines all")
)
def evaluate(
    config: ConfigPath = None, overrides: Overrides = None, baselines: Baselines = None, force: Force = False
) -> None:
    """Rank the test period with every recommender; writes metrics.json, tuning.json and report.html.

    Baselines are tuned first, each with the same number of trials. Their trials and rankings are kept below
    `run_dir/cache/evaluation`, so that after a change to the method only the method is ranked again.
    """
    from pipelines.show import show_table
    from recsys_ray.stages.chain import run_one

    chosen = _config(config, overrides, baselines)
    run_one("evaluate", chosen, Progress(), force)
    show_table(chosen)


@app.command(
    "check-leaks", rich_help_panel="One stage at a time", epilog=_example("recsys-ray check-leaks --config my.yaml")
)
def check_leaks(
    config: ConfigPath = None,
    overrides: Overrides = None,
    sample: Annotated[int, typer.Option(min=1, help="Examples, queries and items of each kind to look at.")] = 2000,
) -> None:
    """Check that no feature of a finished run uses the future; if one does, print a sentence and exit with code 2."""
    from pipelines.leaks import check

    check(_config(config, overrides), Progress(), sample)


@app.command(rich_help_panel="Start here", epilog=_example("recsys-ray report --config my.yaml"))
def report(
    config: ConfigPath = None,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The page; default: `report.html` in the run's folder.")
    ] = None,
) -> None:
    """Write report.html again from a finished run; nothing is computed anew."""
    from pipelines.show import draw_report

    Progress().say(f"report: {draw_report(_config(config, overrides), out)}")


@app.command(rich_help_panel="Start here", epilog=_example("recsys-ray results runs/demo runs/mine"))
def results(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs, e.g. `runs/demo`.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The Markdown page to write.")] = Path("docs/results.md"),
) -> None:
    """Show finished runs' results, and write them into a page with protocol, version, commit and command of each.

    In a page that exists only the part between its two marks is replaced.
    """
    from recsys_ray.report.collect import code, protocol, read_results, write_page
    from recsys_ray.report.terminal import print_results

    console, found = Console(highlight=False), [read_results(run) for run in runs]
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
    """Measure a claim of the papers on your data: runs variants of the configuration and compares them.

    If it is stopped or crashes, start it again: it goes on where it was. Variants lie below `run_dir/variants`.
    """
    from pipelines.study import run_study

    words = ["recsys-ray", "study", name, *(["--config", str(config)] if config else [])]
    words += [word for override in overrides or [] for word in ("--set", override)]
    words += ["--seeds", str(seeds)] if seeds > 1 else []
    for line in run_study(name, _config(config, overrides), seeds, out, shlex.join(words), Progress()):
        print(line)


@app.command(
    rich_help_panel="Measure and tune", epilog=_example("recsys-ray tune --config my.yaml --trials 40 --only two_tower")
)
def tune(
    config: ConfigPath = None,
    overrides: Overrides = None,
    trials: Annotated[int, typer.Option(min=1, help="Finished trials in all, those of earlier runs included.")] = 30,
    out: Annotated[Path, typer.Option("--out", "-o", help="The preset to write.")] = Path("configs/tuned.yaml"),
    only: Annotated[
        list[str] | None, typer.Option(metavar="FIELD", help="Only fields that begin so, e.g. `two_tower`. Repeatable.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Use the trials of earlier runs.")] = True,
) -> None:
    """Search for better settings with Ray Tune, on the validation period only, and write them as a configuration.

    If it is stopped or crashes, start it again: it goes on where it was.
    """
    from pipelines.tune import tune as search

    search(_config(config, overrides), trials, out, only or [], Progress(), fresh=not resume)


@app.command(
    rich_help_panel="Ask and serve",
    epilog=_example("recsys-ray recommend --bundle runs/demo/bundles/current --item podcast-0000001 --type audiobook"),
)
def recommend(
    bundle: BundlePath,
    user: Annotated[str | None, typer.Option("--user", "-u", help="A user id; unknown ones are new users.")] = None,
    item: Annotated[
        list[str] | None, typer.Option("--item", "-i", help="An item that the user has just touched. Repeatable.")
    ] = None,
    age: Annotated[float | None, typer.Option(help="Age in years.")] = None,
    country: Annotated[str | None, typer.Option(help="Country as in the users table.")] = None,
    item_type: Annotated[list[str] | None, typer.Option("--type", "-t", help="Only this type. Repeatable.")] = None,
    k: Annotated[int, typer.Option("-k", help="How many.")] = 10,
    exclude: Annotated[list[str] | None, typer.Option(help="An item to leave out. Repeatable.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Recommend items without a server: for a known user, or for anyone with a few items or traits."""
    from dataclasses import asdict

    from recsys_ray.serving.recommender import Recommender

    recommender = Recommender.load(bundle)
    answer = recommender.answer(
        user_id=user,
        history=[{"item_id": i} for i in item or []] or None,
        age=age,
        country=country,
        item_types=item_type or None,
        k=k,
        exclude=exclude or (),
    )
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
    rich_help_panel="Ask and serve", epilog=_example("recsys-ray serve --bundle runs/demo/bundles/current --port 8000")
)
def serve(
    bundle: BundlePath,
    host: Annotated[str, typer.Option(help="Interface to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    replicas: Annotated[int, typer.Option(min=1, help="Replicas to start with.")] = 1,
    max_replicas: Annotated[int | None, typer.Option(min=1, help="Autoscale up to so many.")] = None,
    address: Annotated[str, typer.Option(help="'local', or a Ray cluster to serve on.")] = "local",
) -> None:
    """Serve a bundle over HTTP with Ray Serve until Ctrl-C: a page at /, the API's documentation at /docs."""
    from serve.deployment import Scaling, serve_forever

    scaling = Scaling(replicas=replicas, max_replicas=max_replicas)
    serve_forever(bundle, host, port, scaling, address, progress=Progress())


@app.command(
    "embed-items",
    rich_help_panel="Embeddings",
    epilog=_example("recsys-ray embed-items new.parquet --bundle runs/mine/bundles/current"),
)
def embed_items(
    items: Annotated[Path, typer.Argument(exists=True, help="New items: a table as for ingest, Parquet or CSV.")],
    bundle: BundlePath,
    interactions: Annotated[
        Path | None, typer.Option("--interactions", "-i", exists=True, help="What users did with them so far.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of bundles; default: the bundle's.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Embed items again that the bundle already has.")] = False,
    current: Annotated[
        bool, typer.Option("--current/--no-current", help="Point `current` at the new bundle, or leave it.")
    ] = True,
) -> None:
    """Add new items to a bundle, without any training: they can be recommended at once."""
    from pipelines.embed_items import embed_items as run_it

    run_it(items, bundle, interactions, out, replace, current, Progress())


@app.command(
    "export-embeddings",
    rich_help_panel="Embeddings",
    epilog=_example("recsys-ray export-embeddings --config my.yaml --out items.parquet"),
)
def export_embeddings(
    out: Annotated[Path, typer.Option("--out", "-o", help="The Parquet file to write.")],
    config: ConfigPath = None,
    overrides: Overrides = None,
    run_dir: Annotated[
        Path | None, typer.Option("--run", help="A run's folder, instead of the one that the configuration names.")
    ] = None,
    bundle: Annotated[
        str | None, typer.Option("--bundle", "-b", help="A bundle instead of a run: with the items that came later.")
    ] = None,
    snapshot: Annotated[str, typer.Option(help="As of which moment: serve, test, valid, cut0, ...")] = "serve",
    vectors: Annotated[
        str, typer.Option(help="Some of text, hgnn and tower, separated by commas.")
    ] = "text,hgnn,tower",
) -> None:
    """Write ids, types, titles and vectors of all items into one Parquet file."""
    from pipelines.export_embeddings import export_embeddings as run_it

    if bundle is not None and snapshot != "serve":
        raise UserError("a bundle has the embeddings of the snapshot 'serve' alone; name a run for another one")
    folder = run_dir or Path(_config(config, overrides).run_dir)
    run_it(folder, bundle, out, snapshot, [name.strip() for name in vectors.split(",")], Progress())


@app.command(rich_help_panel="Embeddings", epilog=_example("recsys-ray probe --config my.yaml"))
def probe(config: ConfigPath = None, overrides: Overrides = None, force: Force = False) -> None:
    """Measure what the embeddings tell of category, language and items that users will share, beside the text."""
    from pipelines.probe import run_probe

    run_probe(_config(config, overrides), Progress(), force)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. A user's mistake is one sentence and exit code 2; anything else is ours and keeps its traceback."""
    try:
        app(args=list(arguments) if arguments is not None else None)
    except UserError as error:
        Console(stderr=True, highlight=False).print(f"error: {error}", markup=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
