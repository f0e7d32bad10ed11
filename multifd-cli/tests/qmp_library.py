"""What the scripts share that drive `multifd` with the QMP library of the QEMU project (PyPI: qemu.qmp)."""

from qemu.qmp import ExecuteError


async def refused(client, class_, description, command, **arguments):
    """Runs a command that is to be refused with this class, for a reason that contains `description`."""
    try:
        await client.execute(command, arguments or None)
    except ExecuteError as error:
        assert error.error_class == class_ and description in str(error), (command, arguments, error)
    else:
        raise AssertionError(f"{command} {arguments} was not refused")


async def wait_event(listener, name, status=None):
    """The next event of that name and, if given, with that status."""
    while True:
        event = await listener.get()
        if event["event"] == name and status in (None, event.get("data", {}).get("status")):
            return event
