//! Holds the hand-derived messages of crate `api` against the .proto files.

use api::{auth, kv};
use metastore_frontend::proto::DESCRIPTORS;
use prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage, FieldDescriptor, Kind, MessageDescriptor, Value};

/// How deep messages that hold themselves are filled.
const DEPTH: usize = 3;

/// Hands out values that differ from field to field.
struct Values(u64);

impl Values {
    fn next(&mut self) -> u64 {
        self.0 += 1;
        self.0
    }

    /// A message with every field set; of each oneof, the alternative that `choice` picks.
    fn message(&mut self, descriptor: &MessageDescriptor, choice: usize, depth: usize) -> DynamicMessage {
        let mut message = DynamicMessage::new(descriptor.clone());
        for field in descriptor.fields() {
            if let Some(oneof) = field.containing_oneof() {
                let alternatives = oneof.fields().len();
                if oneof.fields().nth(choice % alternatives).as_ref() != Some(&field) {
                    continue;
                }
            }
            if matches!(field.kind(), Kind::Message(_)) && depth == 0 {
                continue;
            }
            let value = if field.is_list() {
                Value::List((0..2).map(|_| self.value(&field, choice, depth)).collect())
            } else {
                self.value(&field, choice, depth)
            };
            message.set_field(&field, value);
        }
        message
    }

    fn value(&mut self, field: &FieldDescriptor, choice: usize, depth: usize) -> Value {
        match field.kind() {
            Kind::Int64 => Value::I64(-i64::try_from(self.next()).expect("small")),
            Kind::Uint64 => Value::U64(u64::MAX - self.next()),
            Kind::Bool => Value::Bool(true),
            Kind::Bytes => Value::Bytes(format!("bytes {}", self.next()).into()),
            Kind::String => Value::String(format!("text {}", self.next())),
            // Small, since not every enumeration is large; never 0, which is not encoded.
            Kind::Enum(_) => Value::EnumNumber(1),
            Kind::Message(message) => Value::Message(self.message(&message, choice, depth - 1)),
            other => panic!("{} is of kind {other:?}: let this test fill it", field.full_name()),
        }
    }
}

fn check<T: Message + Default + PartialEq>(name: &str, pool: &DescriptorPool) {
    let descriptor = pool.get_message_by_name(name).expect(name);
    let most_alternatives = 5;
    for choice in 0..most_alternatives {
        let expected = Values(1000).message(&descriptor, choice, DEPTH);
        let bytes = expected.encode_to_vec();
        let ours = T::decode(&*bytes).expect(name);
        let again = DynamicMessage::decode(descriptor.clone(), &*ours.encode_to_vec()).expect(name);
        assert_eq!(again, expected, "{name}, alternative {choice}");
        assert_eq!(ours.encoded_len(), bytes.len(), "{name}, alternative {choice}");
    }
}

#[test]
fn messages_of_api_are_etcds() {
    let pool = DescriptorPool::decode(DESCRIPTORS).expect("ours");
    macro_rules! check_all {
        ($($module:ident in $package:literal: $($name:ident)*;)*) => {
            $($(check::<$module::$name>(concat!($package, ".", stringify!($name)), &pool);)*)*
        };
    }
    check_all! {
        kv in "mvccpb": KeyValue Event;
        kv in "etcdserverpb": ResponseHeader RangeRequest RangeResponse PutRequest PutResponse DeleteRangeRequest
            DeleteRangeResponse RequestOp ResponseOp Compare TxnRequest TxnResponse CompactionRequest
            CompactionResponse LeaseGrantRequest LeaseGrantResponse LeaseRevokeRequest LeaseRevokeResponse
            LeaseKeepAliveResponse LeaseTimeToLiveResponse LeaseStatus LeaseLeasesResponse Member AlarmRequest
            AlarmMember AlarmResponse;
        auth in "authpb": User UserAddOptions Permission Role;
        auth in "etcdserverpb": AuthEnableRequest AuthEnableResponse AuthDisableRequest AuthDisableResponse AuthStatusRequest
            AuthStatusResponse AuthenticateRequest AuthenticateResponse AuthUserAddRequest AuthUserAddResponse
            AuthUserGetRequest AuthUserGetResponse AuthUserListRequest AuthUserListResponse
            AuthUserDeleteRequest AuthUserDeleteResponse AuthUserChangePasswordRequest
            AuthUserChangePasswordResponse AuthUserGrantRoleRequest AuthUserGrantRoleResponse
            AuthUserRevokeRoleRequest AuthUserRevokeRoleResponse AuthRoleAddRequest AuthRoleAddResponse
            AuthRoleGetRequest AuthRoleGetResponse AuthRoleListRequest AuthRoleListResponse
            AuthRoleDeleteRequest AuthRoleDeleteResponse AuthRoleGrantPermissionRequest
            AuthRoleGrantPermissionResponse AuthRoleRevokePermissionRequest AuthRoleRevokePermissionResponse;
    }
}

#[test]
fn enumerations_of_api_are_etcds() {
    let pool = DescriptorPool::decode(DESCRIPTORS).expect("ours");
    macro_rules! check {
        ($name:literal, $module:ident::$enumeration:ident: $($value:ident)*) => {
            let descriptor = pool.get_enum_by_name($name).expect($name);
            let etcds: Vec<_> = descriptor
                .values()
                .map(|value| (value.name().replace('_', "").to_lowercase(), value.number()))
                .collect();
            let ours = [$((stringify!($value).to_lowercase(), $module::$enumeration::$value as i32),)*];
            assert_eq!(etcds, ours, $name);
        };
    }
    check!("mvccpb.Event.EventType", kv::EventType: Put Delete);
    check!("etcdserverpb.RangeRequest.SortOrder", kv::SortOrder: None Ascend Descend);
    check!("etcdserverpb.RangeRequest.SortTarget", kv::SortTarget: Key Version Create Mod Value);
    check!("etcdserverpb.AlarmRequest.AlarmAction", kv::AlarmAction: Get Activate Deactivate);
    check!("etcdserverpb.AlarmType", kv::AlarmType: None Nospace Corrupt);
    check!("etcdserverpb.Compare.CompareResult", kv::CompareResult: Equal Greater Less NotEqual);
    check!("etcdserverpb.Compare.CompareTarget", kv::CompareTarget: Version Create Mod Value Lease);
    check!("authpb.Permission.Type", auth::PermissionType: Read Write Readwrite);
}
