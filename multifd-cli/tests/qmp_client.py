"""Drives a whole migration between two `multifd guest` with the QMP library of the QEMU project (PyPI: qemu.qmp).

Called with the monitors of a source and of a destination that waits for `migrate-incoming`, and the URI to migrate to.
"""

import asyncio
import sys

from qemu.qmp import QMPClient

from qmp_library import refused, wait_event


async def main(source_path, destination_path, uri):
    source, destination = QMPClient("source"), QMPClient("destination")
    await source.connect(source_path)
    await destination.connect(destination_path)
    for client, state in ((source, "running"), (destination, "inmigrate")):
        version = await client.execute("query-version")
        assert "multifd" in version["package"], version
        assert (await client.execute("query-status"))["status"] == state
        assert await client.execute("query-migrate") == {}
        commands = {command["name"] for command in await client.execute("query-commands")}
        assert {"migrate", "migrate-incoming", "query-migrate", "stop", "cont", "quit"} <= commands, commands
        await client.execute(
            "migrate-set-capabilities",
            {"capabilities": [{"capability": "multifd", "state": True}, {"capability": "events", "state": True}]},
        )
        await client.execute("migrate-set-parameters", {"multifd-channels": 3, "multifd-compression": "zstd"})
    await refused(source, "CommandNotFound", "", "nonesuch")
    await refused(source, "GenericError", "", "migrate", uri="foo:bar")
    await refused(source, "GenericError", "", "migrate-set-parameters", **{"tls-creds": "tls0"})

    with source.listener() as of_source, destination.listener() as of_destination:
        await destination.execute("migrate-incoming", {"uri": uri})
        # Too slow to end before it is told to be faster.
        await source.execute("migrate-set-parameters", {"max-bandwidth": 4 << 20, "downtime-limit": 50})
        await source.execute("migrate", {"uri": uri})
        await wait_event(of_source, "MIGRATION", "active")
        await refused(source, "GenericError", "", "migrate", uri=uri)
        answer = await source.execute("query-migrate")
        assert answer["status"] == "active" and isinstance(answer["total-time"], int), answer
        await source.execute("migrate-set-parameters", {"max-bandwidth": 0, "downtime-limit": 2000})
        parameters = await source.execute("query-migrate-parameters")
        assert (parameters["max-bandwidth"], parameters["downtime-limit"]) == (0, 2000), parameters
        await wait_event(of_source, "MIGRATION_PASS")
        await wait_event(of_source, "STOP")
        await wait_event(of_source, "MIGRATION", "completed")
        await wait_event(of_destination, "MIGRATION", "completed")
        await wait_event(of_destination, "RESUME")

    answer = await source.execute("query-migrate")
    assert answer["status"] == "completed" and isinstance(answer["downtime"], int), answer
    assert answer["ram"]["multifd-bytes"] > 0 and answer["ram"]["remaining"] == 0, answer
    assert (await source.execute("query-status"))["status"] == "postmigrate"

    with destination.listener(("STOP", "RESUME")) as events:
        await destination.execute("stop")
        await wait_event(events, "STOP")
        assert (await destination.execute("query-status")) == {"status": "paused", "running": False}
        await destination.execute("cont")
        await wait_event(events, "RESUME")
    assert (await destination.execute("query-status"))["running"]
    status = await destination.execute("x-guest-status")
    assert status["guest-errors"] == 0 and status["state"] == "running", status
    for client in (source, destination):
        await client.execute("quit")
        await client.disconnect()
    print("driven by qemu.qmp")


asyncio.run(asyncio.wait_for(main(*sys.argv[1:]), 100))
