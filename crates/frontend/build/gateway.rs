//! Writes the JSON gateway's tables: which path stands for which method (`google.api.http` in the .proto files), and
//! what is in the messages that go through it.

use std::collections::BTreeMap;
use std::fmt::Write;

use prost_reflect::{Cardinality, DescriptorPool, DynamicMessage, EnumDescriptor, Kind, MessageDescriptor, Value};

/// The most fields in a message: the decoder notes in a u64 which of them it has seen.
const FIELDS_MAX: usize = 64;

#[derive(Default)]
struct Tables {
    /// What is named here is in `code`, or about to be.
    messages: BTreeMap<String, String>,
    enums: BTreeMap<String, String>,
    code: String,
}

/// The Rust code of `ROUTES` and all that it refers to.
///
/// # Panics
/// If a method or a message has what the gateway cannot translate.
pub(crate) fn tables(pool: &DescriptorPool) -> String {
    let http = pool
        .get_extension_by_name("google.api.http")
        .expect("annotations.proto has it");
    let mut tables = Tables::default();
    let mut routes = String::new();
    for method in pool
        .services()
        .flat_map(|service| service.methods().collect::<Vec<_>>())
    {
        let options = method.options();
        if !options.has_extension(&http) {
            continue;
        }
        let rule = options.get_extension(&http);
        let rule = rule.as_message().expect("HttpRule is a message");
        let (input, output) = (tables.message(&method.input()), tables.message(&method.output()));
        for path in paths(rule) {
            writeln!(
                routes,
                "Route {{ path: {path:?}, service: {:?}, method: {:?}, input: &{input}, output: &{output} }},",
                method.parent_service().full_name(),
                method.name()
            )
            .expect("a String grows");
        }
    }
    format!("{}pub(crate) static ROUTES: &[Route] = &[\n{routes}];\n", tables.code)
}

fn paths(rule: &DynamicMessage) -> Vec<String> {
    let text = |name: &str| match rule.get_field_by_name(name).as_deref() {
        Some(Value::String(text)) => text.clone(),
        _ => panic!("HttpRule has a text {name}"),
    };
    assert_eq!(text("body"), "*", "the gateway takes the whole request from the body");
    let mut all = vec![text("post")];
    let more = rule
        .get_field_by_name("additional_bindings")
        .expect("HttpRule has further bindings");
    for rule in more.as_list().expect("they are a list") {
        all.extend(paths(rule.as_message().expect("of rules")));
    }
    all
}

impl Tables {
    /// The name of a message's table.
    fn message(&mut self, message: &MessageDescriptor) -> String {
        let full_name = message.full_name().to_owned();
        if let Some(table) = self.messages.get(&full_name) {
            return table.clone();
        }
        let table = format!("MESSAGE_{}", self.messages.len());
        self.messages.insert(full_name.clone(), table.clone());
        // Declared, and so printed, in order of their numbers, which is the order that they have on the wire: what is
        // on its way out is translated as it comes.
        let declared: Vec<_> = message.fields().collect();
        let numbers: Vec<u32> = message
            .descriptor_proto()
            .field
            .iter()
            .map(|field| u32::try_from(field.number()).expect("field numbers are positive"))
            .collect();
        assert!(
            numbers.is_sorted(),
            "{full_name}: fields must be declared in order of their numbers"
        );
        assert!(declared.len() <= FIELDS_MAX, "{full_name} has too many fields");
        let mut fields = String::new();
        for field in &declared {
            assert!(!field.is_map(), "{}: no maps in the gateway", field.full_name());
            let kind = match field.kind() {
                Kind::Bool => "Kind::Bool".to_owned(),
                Kind::Int32 => "Kind::Int32".to_owned(),
                Kind::Int64 => "Kind::Int64".to_owned(),
                Kind::Uint32 => "Kind::Uint32".to_owned(),
                Kind::Uint64 => "Kind::Uint64".to_owned(),
                Kind::String => "Kind::String".to_owned(),
                Kind::Bytes => "Kind::Bytes".to_owned(),
                Kind::Enum(values) => format!("Kind::Enum(&{})", self.values(&values)),
                Kind::Message(message) => format!("Kind::Message(&{})", self.message(&message)),
                other => panic!("{}: no {other:?} in the gateway", field.full_name()),
            };
            let oneof = field.containing_oneof().map(|oneof| oneof.full_name().to_owned());
            writeln!(
                fields,
                "Field {{ number: {}, name: {:?}, json_name: {:?}, kind: {kind}, repeated: {}, oneof: {oneof:?} }},",
                field.number(),
                field.name(),
                field.json_name(),
                field.cardinality() == Cardinality::Repeated,
            )
            .expect("a String grows");
        }
        writeln!(
            self.code,
            "static {table}: Message = Message {{ fields: &[\n{fields}] }};"
        )
        .expect("a String grows");
        table
    }

    /// The name of an enumeration's table.
    fn values(&mut self, values: &EnumDescriptor) -> String {
        let full_name = values.full_name().to_owned();
        if let Some(table) = self.enums.get(&full_name) {
            return table.clone();
        }
        let table = format!("ENUM_{}", self.enums.len());
        self.enums.insert(full_name, table.clone());
        let pairs: Vec<_> = values
            .values()
            .map(|value| (value.name().to_owned(), value.number()))
            .collect();
        writeln!(self.code, "static {table}: Enum = Enum {{ values: &{pairs:?} }};").expect("a String grows");
        table
    }
}
