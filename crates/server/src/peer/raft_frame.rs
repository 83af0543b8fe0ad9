//! Raft's messages in frames.

use bytes::{Buf as _, Bytes};

use super::frame::FrameBatch;
use super::wire::kind;

/// Bytes at which a frame is full. A bigger message goes alone.
const FRAME_BYTES: usize = 1 << 20;
/// Most messages in a frame: so many tiny ones must not take much more memory than their bytes.
const FRAME_MESSAGES_MAX: usize = 8192;
/// Bytes around one message that is alone in its frame.
pub(super) const OVERHEAD: usize = 5;

/// Puts messages into as few frames as they fit.
pub(super) fn encode(messages: &[Bytes], batch: &mut FrameBatch) {
    let mut in_frame = 0;
    for message in messages {
        let full = || batch.frame_bytes() + 4 + message.len() > FRAME_BYTES || in_frame == FRAME_MESSAGES_MAX;
        if in_frame > 0 && full() {
            batch.end();
            in_frame = 0;
        }
        if in_frame == 0 {
            batch.begin(kind::MESSAGES);
        }
        // Longer ones are not taken for sending.
        batch.put_u32(message.len() as u32);
        batch.put(message);
        in_frame += 1;
    }
    if in_frame > 0 {
        batch.end();
    }
}

/// Adds the messages in the body of a frame to `out`.
pub(super) fn decode(mut body: Bytes, out: &mut Vec<Bytes>) -> Result<(), &'static str> {
    let mut in_frame = 0;
    while !body.is_empty() {
        if body.len() < 4 {
            return Err("a message's length is cut off");
        }
        let length = body.get_u32_le() as usize;
        if length == 0 || length > body.len() {
            return Err("a message's length is wrong");
        }
        if in_frame == FRAME_MESSAGES_MAX {
            return Err("too many messages in a frame");
        }
        out.push(body.split_to(length));
        in_frame += 1;
    }
    Ok(())
}
