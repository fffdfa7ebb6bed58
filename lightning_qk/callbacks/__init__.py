"""The only packages that know Lightning's hooks: monitors, interventions, guard.

May import everything but inspect, module, data and cli.
"""

from typing import TYPE_CHECKING

from lightning_qk._packages import lazy
from lightning_qk.callbacks import guard, interventions, monitors

if TYPE_CHECKING:
    from lightning_qk.callbacks.guard import *  # noqa: F403
    from lightning_qk.callbacks.interventions import *  # noqa: F403
    from lightning_qk.callbacks.monitors import *  # noqa: F403

__all__: list[str] = []
__all__ += guard.__all__
__all__ += interventions.__all__
__all__ += monitors.__all__

__getattr__, __dir__ = lazy(
    __name__,
    {"guard": guard.__all__, "interventions": interventions.__all__, "monitors": monitors.__all__},
)
