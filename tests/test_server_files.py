"""The store of finished pictures: bounded by count, bytes and age."""

from __future__ import annotations

from ditrelay.server.files import FileStore


def test_a_file_comes_back_under_an_id_that_nobody_can_guess():
    store = FileStore()
    ids = {store.add(b"one", "image/png") for _ in range(100)}
    assert len(ids) == 100
    assert all(len(file_id) == 32 for file_id in ids)
    assert all(store.get(file_id).content == b"one" for file_id in ids)


def test_past_the_count_the_oldest_go():
    store = FileStore(max_files=2)
    ids = [store.add(bytes([i]), "image/png") for i in range(4)]
    assert [store.get(file_id) is not None for file_id in ids] == [False, False, True, True]
    assert store.nbytes == 2


def test_past_the_bytes_the_oldest_go():
    store = FileStore(max_bytes=10)
    ids = [store.add(b"x" * 4, "image/png") for _ in range(3)]
    assert [store.get(file_id) is not None for file_id in ids] == [False, True, True]
    assert store.nbytes == 8


def test_one_clients_burst_takes_no_other_clients_files():
    store = FileStore(max_files=10, max_bytes=100)
    mine = [store.add(b"mine", "image/png", "10.0.0.1") for _ in range(3)]
    for _ in range(50):
        store.add(b"x", "image/png", "10.0.0.2")
    assert all(store.get(file_id) for file_id in mine) and len(store) == 10
    for _ in range(3):
        store.add(b"x" * 60, "image/png", "10.0.0.2")
    assert all(store.get(file_id) for file_id in mine) and store.nbytes <= 100
    newest = FileStore(max_files=2)
    ids = [newest.add(b"x", "image/png", client) for client in ("10.0.0.1", "10.0.0.1", "10.0.0.2", "10.0.0.2")]
    assert newest.get(ids[-1]) and len(newest) == 2


def test_one_file_larger_than_the_store_is_kept_until_the_next():
    store = FileStore(max_bytes=10)
    large = store.add(b"x" * 11, "image/png")
    assert store.get(large) is not None
    store.add(b"x", "image/png")
    assert store.get(large) is None
    assert store.nbytes == 1


def test_files_expire_and_free_their_memory():
    now = [0.0]
    store = FileStore(lifetime=3600.0, clock=lambda: now[0])
    old = store.add(b"old", "image/png")
    now[0] = 3599.0
    assert store.get(old) is not None
    young = store.add(b"young", "image/png")
    now[0] = 3600.0
    assert store.get(old) is None
    assert store.get(young) is not None
    assert (len(store), store.nbytes) == (1, len(b"young"))
