//! What the gateway knows of messages: tables that the build script writes from the .proto files.

/// A path of the gateway.
#[derive(Debug)]
pub(crate) struct Route {
    /// The whole path, such as `/v3/kv/range`.
    pub(crate) path: &'static str,
    /// The method's service, by its full name.
    pub(crate) service: &'static str,
    /// The method's name.
    pub(crate) method: &'static str,
    /// Its request.
    pub(crate) input: &'static Message,
    /// Its reply.
    pub(crate) output: &'static Message,
}

/// A protobuf message.
#[derive(Debug)]
pub(crate) struct Message {
    /// Its fields, in order of their numbers; at most 64.
    pub(crate) fields: &'static [Field],
}

/// A field of a message.
#[derive(Debug)]
pub(crate) struct Field {
    /// Its number on the wire.
    pub(crate) number: u32,
    /// Its name in the .proto file, which is the one in replies.
    pub(crate) name: &'static str,
    /// Its other name, which requests may use as well.
    pub(crate) json_name: &'static str,
    /// What it holds.
    pub(crate) kind: Kind,
    /// Whether it holds a list.
    pub(crate) repeated: bool,
    /// The oneof that it belongs to, by its full name.
    pub(crate) oneof: Option<&'static str>,
}

/// What a field holds.
#[derive(Debug, Clone, Copy)]
#[allow(dead_code, reason = "which of them there are is up to the .proto files")]
pub(crate) enum Kind {
    Bool,
    Int32,
    Int64,
    Uint32,
    Uint64,
    String,
    Bytes,
    Enum(&'static Enum),
    Message(&'static Message),
}

impl Kind {
    /// Its name in errors, as Go's protobuf has it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Bool => "bool",
            Kind::Int32 => "int32",
            Kind::Int64 => "int64",
            Kind::Uint32 => "uint32",
            Kind::Uint64 => "uint64",
            Kind::String => "string",
            Kind::Bytes => "bytes",
            Kind::Enum(_) => "enum",
            Kind::Message(_) => "message",
        }
    }
}

/// An enumeration.
#[derive(Debug)]
pub(crate) struct Enum {
    /// Names and numbers.
    pub(crate) values: &'static [(&'static str, i32)],
}

impl Message {
    /// The field of this name, either of its two.
    pub(crate) fn by_name(&self, name: &str) -> Option<(usize, &'static Field)> {
        let by = |is: fn(&Field) -> &'static str| self.fields.iter().enumerate().find(|(_, field)| is(field) == name);
        by(|field| field.json_name).or_else(|| by(|field| field.name))
    }

    /// The field of this number.
    pub(crate) fn by_number(&self, number: u32) -> Option<&'static Field> {
        self.fields.iter().find(|field| field.number == number)
    }
}

impl Enum {
    /// The number of a name.
    pub(crate) fn number(&self, name: &str) -> Option<i32> {
        let found = self.values.iter().find(|(known, _)| *known == name);
        found.map(|&(_, number)| number)
    }

    /// The name of a number.
    pub(crate) fn name(&self, number: i32) -> Option<&'static str> {
        let found = self.values.iter().find(|(_, known)| *known == number);
        found.map(|&(name, _)| name)
    }
}

include!(concat!(env!("OUT_DIR"), "/gateway.rs"));
