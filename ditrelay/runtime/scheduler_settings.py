"""The scheduler's limits, as the settings have them."""

from __future__ import annotations

from ditrelay.runtime.scheduler import SchedulerConfig
from ditrelay.runtime.server_args import ServerArgs

COMPILE_SECONDS = 120.0  # a prompt of another length may compile anew, whenever it comes: that is no hang


def scheduler_config(args: ServerArgs) -> SchedulerConfig:
    return SchedulerConfig(
        max_pending_transfers=args.max_pending_transfers,
        max_pending_bytes=args.max_pending_bytes,
        max_queue=args.max_queue,
        lock_step=not args.use_async_comm,
        transfer_timeout=args.dist_timeout,
        stage_timeout=args.stage_timeout,
        hang_timeout=max(args.dist_timeout, COMPILE_SECONDS) if args.enable_torch_compile else args.dist_timeout,
        startup_timeout=args.startup_timeout,
        max_attempts=args.max_attempts,
    )
