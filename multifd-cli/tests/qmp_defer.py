"""Has a `multifd receive defer` take a guest, driven by the QMP library of the QEMU project (PyPI: qemu.qmp).

Called with the monitors of a `multifd guest` and of the `receive`, and the path of the socket to migrate over.
"""

import asyncio
import sys

from qemu.qmp import QMPClient

from qmp_library import refused, wait_event


async def main(source_path, receive_path, path):
    source, receive = QMPClient("source"), QMPClient("receive")
    await source.connect(source_path)
    await receive.connect(receive_path)
    assert (await receive.execute("query-status"))["status"] == "inmigrate"
    assert await receive.execute("query-migrate") == {}
    # Nothing is under way, and it waits on.
    await receive.execute("migrate_cancel")
    channel = {"channel-type": "main", "addr": {"transport": "socket", "type": "unix", "path": path}}
    await refused(receive, "GenericError", "need either", "migrate-incoming")
    await refused(receive, "GenericError", "need either", "migrate-incoming", uri=f"unix:{path}", channels=[channel])
    await refused(receive, "GenericError", "No such file", "migrate-incoming", uri="unix:/nonesuch/directory/socket")
    await refused(receive, "GenericError", "waiting for an incoming", "migrate", uri=f"unix:{path}")
    await refused(source, "GenericError", "'-incoming' was not specified", "migrate-incoming", uri=f"unix:{path}")
    with receive.listener() as of_receive, source.listener() as of_source:
        await receive.execute("migrate-incoming", {"channels": [channel], "exit-on-error": False})
        answer = await receive.execute("query-migrate")
        assert answer["status"] == "setup", answer
        assert answer["socket-address"] == [{"type": "unix", "path": path}], answer
        await refused(receive, "GenericError", "already been started", "migrate-incoming", uri=f"unix:{path}")
        await source.execute("migrate", {"channels": [channel]})
        await wait_event(of_receive, "MIGRATION", "active")
        await wait_event(of_receive, "MIGRATION", "completed")
        # The source hears of it a moment later, and does not end before.
        await wait_event(of_source, "MIGRATION", "completed")
    assert (await receive.execute("query-migrate"))["status"] == "completed"
    for client in (source, receive):
        await client.execute("quit")
        await client.disconnect()
    print("driven by qemu.qmp")


asyncio.run(asyncio.wait_for(main(*sys.argv[1:]), 100))
