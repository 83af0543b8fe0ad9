use super::*;

fn put(id: RequestId, key: &'static str, value: &'static str) -> Operation {
    let put = PutRequest {
        key: key.into(),
        value: value.into(),
        ..Default::default()
    };
    Operation::new(id, Action::Put(put))
}

fn entry(operations: &[Operation]) -> Bytes {
    let encoded: Vec<Bytes> = operations.iter().map(encode_operation).collect();
    encode_entry(encoded.iter().map(|bytes| &bytes[..])).into()
}

#[test]
fn a_single_operation_has_golden_bytes() {
    let data = entry(&[put(7, "k", "v")]);
    let golden: &[u8] = &[
        0x8f, 0x01, // envelope, version 1
        0x0a, 0x0d, // single, 13 bytes
        0xa2, 0x06, 0x02, 0x08, 0x07, // header { id: 7 }
        0x22, 0x06, 0x0a, 0x01, b'k', 0x12, 0x01, b'v', // put { key, value }
    ];
    // The order of the two fields inside is prost's (declaration order by tag), so compare what they mean as well.
    assert_eq!(
        decode_entry(&Bytes::from_static(golden)).unwrap(),
        vec![put(7, "k", "v")]
    );
    assert_eq!(data.len(), golden.len());
    assert_eq!(decode_entry(&data).unwrap(), vec![put(7, "k", "v")]);
}

#[test]
fn a_batch_has_golden_bytes() {
    let golden: &[u8] = &[
        0x8f, 0x01, // envelope, version 1
        0x12, 0x1e, // batch, 30 bytes
        0x0a, 0x0d, 0x22, 0x06, 0x0a, 0x01, b'a', 0x12, 0x01, b'1', 0xa2, 0x06, 0x02, 0x08, 0x01, //
        0x0a, 0x0d, 0x22, 0x06, 0x0a, 0x01, b'b', 0x12, 0x01, b'2', 0xa2, 0x06, 0x02, 0x08, 0x02,
    ];
    let operations = vec![put(1, "a", "1"), put(2, "b", "2")];
    assert_eq!(entry(&operations), golden);
    assert_eq!(decode_entry(&Bytes::from_static(golden)).unwrap(), operations);
    // What we write by hand is what prost would write.
    let batch = RaftMessage {
        payload: Some(Payload::Batch(Batch { operations })),
    };
    assert_eq!(batch.encode_to_vec(), golden[2..]);
}

#[test]
fn a_bare_operation_is_read() {
    // As etcd's WAL holds it: InternalRaftRequest { header { ID: 9 }, delete_range { key: "k", range_end: "l" } }.
    let golden: &[u8] = &[
        0xa2, 0x06, 0x02, 0x08, 0x09, 0x2a, 0x06, 0x0a, 0x01, b'k', 0x12, 0x01, b'l',
    ];
    let operations = decode_entry(&Bytes::from_static(golden)).unwrap();
    let delete = DeleteRangeRequest {
        key: "k".into(),
        range_end: "l".into(),
        prev_kv: false,
    };
    assert_eq!(operations, vec![Operation::new(9, Action::DeleteRange(delete))]);
}

/// As etcd's WAL holds them: `InternalRaftRequest`, marshalled by etcd 3.7.
#[test]
fn auth_operations_have_etcds_numbers() {
    use crate::auth::*;
    let permission = Permission {
        perm_type: PermissionType::Readwrite as i32,
        key: "k".into(),
        range_end: "l".into(),
    };
    let name = || "n".to_owned();
    let cases: &[(Action, &[u8])] = &[
        (Action::AuthEnable(AuthEnableRequest {}), b"\xc2\x3e\x00"),
        (Action::AuthDisable(AuthDisableRequest {}), b"\x9a\x3f\x00"),
        (
            Action::Authenticate(InternalAuthenticateRequest {
                name: name(),
                password: String::new(),
                simple_token: "t".to_owned(),
            }),
            b"\xa2\x3f\x06\x0a\x01n\x1a\x01t",
        ),
        (Action::AuthStatus(AuthStatusRequest {}), b"\xaa\x3f\x00"),
        (
            Action::AuthUserAdd(AuthUserAddRequest {
                name: name(),
                options: Some(UserAddOptions { no_password: true }),
                hashed_password: "h".to_owned(),
                ..Default::default()
            }),
            b"\xe2\x44\x0a\x0a\x01n\x1a\x02\x08\x01\x22\x01h",
        ),
        (
            Action::AuthUserDelete(AuthUserDeleteRequest { name: name() }),
            b"\xea\x44\x03\x0a\x01n",
        ),
        (
            Action::AuthUserGet(AuthUserGetRequest { name: name() }),
            b"\xf2\x44\x03\x0a\x01n",
        ),
        (
            Action::AuthUserChangePassword(AuthUserChangePasswordRequest {
                name: name(),
                hashed_password: "h".to_owned(),
                ..Default::default()
            }),
            b"\xfa\x44\x06\x0a\x01n\x1a\x01h",
        ),
        (
            Action::AuthUserGrantRole(AuthUserGrantRoleRequest {
                user: name(),
                role: "r".to_owned(),
            }),
            b"\x82\x45\x06\x0a\x01n\x12\x01r",
        ),
        (
            Action::AuthUserRevokeRole(AuthUserRevokeRoleRequest {
                name: name(),
                role: "r".to_owned(),
            }),
            b"\x8a\x45\x06\x0a\x01n\x12\x01r",
        ),
        (Action::AuthUserList(AuthUserListRequest {}), b"\x92\x45\x00"),
        (Action::AuthRoleList(AuthRoleListRequest {}), b"\x9a\x45\x00"),
        (
            Action::AuthRoleAdd(AuthRoleAddRequest { name: name() }),
            b"\x82\x4b\x03\x0a\x01n",
        ),
        (
            Action::AuthRoleDelete(AuthRoleDeleteRequest { role: name() }),
            b"\x8a\x4b\x03\x0a\x01n",
        ),
        (
            Action::AuthRoleGet(AuthRoleGetRequest { role: name() }),
            b"\x92\x4b\x03\x0a\x01n",
        ),
        (
            Action::AuthRoleGrantPermission(AuthRoleGrantPermissionRequest {
                name: name(),
                perm: Some(permission),
            }),
            b"\x9a\x4b\x0d\x0a\x01n\x12\x08\x08\x02\x12\x01k\x1a\x01l",
        ),
        (
            Action::AuthRoleRevokePermission(AuthRoleRevokePermissionRequest {
                role: name(),
                key: "k".into(),
                range_end: "l".into(),
            }),
            b"\xa2\x4b\x09\x0a\x01n\x12\x01k\x1a\x01l",
        ),
    ];
    for (action, golden) in cases {
        // RequestHeader { ID: 9, username: "u", auth_revision: 3 }
        let data = [&b"\xa2\x06\x07\x08\x09\x12\x01u\x18\x03"[..], golden].concat();
        let operation = Operation::of_user(9, "u".to_owned(), 3, action.clone());
        assert_eq!(
            decode_entry(&Bytes::from(data.clone())).unwrap(),
            std::slice::from_ref(&operation)
        );
        // prost writes the header after the action, so the order differs and nothing else.
        let encoded = encode_operation(&operation);
        assert_eq!(encoded.len(), data.len());
        assert_eq!(decode_entry(&encoded).unwrap(), [operation]);
    }
}

#[test]
fn empty_data_is_no_operation() {
    assert_eq!(decode_entry(&Bytes::new()).unwrap(), vec![]);
}

#[test]
fn what_is_not_known_is_refused() {
    assert_eq!(
        decode_entry(&Bytes::from_static(&[MAGIC, 2, 0])),
        Err(DecodeError::NewerVersion { found: 2 })
    );
    for bytes in [
        &[MAGIC][..],
        &[MAGIC, 0],
        &[MAGIC, 1],
        &[MAGIC, 1, 0x0a, 0x7f],
        // An operation whose action we do not know (field 2000).
        &[0x82, 0x7d, 0x00],
        // A batch with such an operation among its own.
        &[MAGIC, 1, 0x12, 0x05, 0x0a, 0x03, 0x82, 0x7d, 0x00],
        b"{\"key\":1}",
        &[0xff; 40],
        &[0x00],
        &[0x01],
    ] {
        let error = decode_entry(&Bytes::copy_from_slice(bytes)).unwrap_err();
        assert!(matches!(error, DecodeError::Unknown { .. }), "{bytes:x?}: {error}");
    }
}

/// Cutting an entry anywhere is noticed, whatever its form.
#[test]
fn no_prefix_of_an_entry_is_an_entry() {
    let data = entry(&[put(1, "alpha", "one"), put(2, "beta", "two")]);
    for length in 1..data.len() {
        assert!(decode_entry(&data.slice(..length)).is_err(), "{length}");
    }
}

/// What validation lets through, the log must be able to give back: a committed entry that does not decode would stop
/// every member for good.
#[test]
fn the_deepest_valid_transaction_survives_the_log() {
    use crate::kv::{Compare, RequestOp, RequestOpKind, TargetUnion};
    use crate::limits::TXN_DEPTH_MAX;
    let op = |kind| RequestOp { request: Some(kind) };
    let compare = || Compare {
        key: "c".into(),
        target_union: Some(TargetUnion::Value("v".into())),
        ..Default::default()
    };
    let leaf = PutRequest {
        key: "k".into(),
        value: "v".into(),
        ..Default::default()
    };
    let nested = |depth: usize| {
        let mut txn = TxnRequest {
            compare: vec![compare()],
            success: vec![op(RequestOpKind::Put(leaf.clone()))],
            failure: vec![],
        };
        for _ in 1..depth {
            txn = TxnRequest {
                compare: vec![compare()],
                success: vec![op(RequestOpKind::Txn(txn))],
                failure: vec![],
            };
        }
        txn
    };
    assert_eq!(nested(TXN_DEPTH_MAX + 1).validate(1000), Err(crate::Error::TooManyOps));
    let deepest = nested(TXN_DEPTH_MAX);
    deepest.validate(1000).unwrap();
    let operations = vec![
        Operation::new(1, Action::Txn(deepest.clone())),
        Operation::new(2, Action::Txn(deepest)),
    ];
    assert_eq!(decode_entry(&entry(&operations)).unwrap(), operations);
}

/// What the fuzz target checks, on what becomes of entries by chance: operations that are read mean the same when they
/// are written anew.
#[test]
fn damaged_entries_are_refused_or_mean_the_same() {
    let entries: [&[u8]; 3] = [
        &entry(&[put(7, "k", "v")]),
        &entry(&[put(1, "a", "1"), put(2, "b", "2"), put(3, "c", "3")]),
        &[
            0xa2, 0x06, 0x02, 0x08, 0x09, 0x2a, 0x06, 0x0a, 0x01, b'k', 0x12, 0x01, b'l',
        ],
    ];
    let mut read = 0;
    for whole in entries {
        for at in 0..whole.len() {
            for byte in 0..=u8::MAX {
                let mut data = whole.to_vec();
                data[at] = byte;
                for data in [&data[..], &data[..at]] {
                    let Ok(operations) = decode_entry(&Bytes::copy_from_slice(data)) else {
                        continue;
                    };
                    if operations.is_empty() {
                        continue;
                    }
                    read += 1;
                    assert_eq!(
                        decode_entry(&entry(&operations)).as_ref(),
                        Ok(&operations),
                        "{data:02x?}"
                    );
                }
            }
        }
    }
    assert!(read > 1000, "only {read} can be read");
}
