"""Lightning callbacks. With the ready-made job, the only code that knows Lightning."""
