"""``python -m cosmos_ray watch``: the live page of a run or a store, until Ctrl-C. Loads neither torch nor Ray."""

from __future__ import annotations

import argparse

from cosmos_ray.caches import local_root
from cosmos_ray.commands.configure import configure
from cosmos_ray.config.stored import store_of, stored_config
from cosmos_ray.errors import ConfigError
from cosmos_ray.port import address, bound, is_local, serve_until_told, token_for
from cosmos_ray.progress import say

EXTRA = "the page needs FastAPI and uvicorn: pip install 'cosmos-ray[serve]'"


def watch(options: argparse.Namespace) -> str:
    """Serve the page of the run of ``--name`` or of the store ``--store``; returns what to print at the end.

    ConfigError for a run that is not there, a port that is taken, and for an address beyond this machine without a token; StoreError for a
    store that is none.
    """
    try:
        import uvicorn  # noqa: F401 - its lack is told at once

        from cosmos_ray.watch.app import Watch, make_app
    except ModuleNotFoundError as error:
        raise ConfigError(f"{EXTRA} ({error})") from error
    token = token_for(options.host, "?token=SECRET once or as `Authorization: Bearer SECRET`")
    config, folder, store = None, None, options.store
    if store and options.name:
        raise ConfigError(f"--store {store} and --name {options.name} are two stores: give one of them")
    if not store:
        asked = configure(options)
        config = stored_config(asked)
        if config is None:
            raise ConfigError(f"there is no run {asked.name!r} in {asked.root}: give --root and --name of a run, or --store")
        folder, store = local_root(config.root) / config.name, store_of(config)
    with bound(options.host, options.port) as listening:
        page = Watch(store, folder, config)
        try:
            page.begin()
            beyond = "" if is_local(options.host) or not token else "?token=$COSMOS_RAY_TOKEN"
            what, where = config.name if config else store, address(options.host, listening)
            say(f"live page of {what}: http://{where}/{beyond}", options.quiet)
            serve_until_told(make_app(page, token), listening, timeout_graceful_shutdown=1)
        finally:
            page.close()
    return "the page is closed; the run goes on"
