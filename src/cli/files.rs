//! Files of users: JSON Lines and CSV. What was written is read again as it was.

use std::{
    io::{self, BufRead, BufReader, BufWriter, Read, Write},
    path::Path,
};

use anyhow::{Context, anyhow, bail, ensure};
use clap::ValueEnum;
use csv_core::ReadRecordResult;
use serde::{Deserialize, Serialize, de::IgnoredAny};

use crate::pb;

/// A line has fewer octets than this: what is longer is no user.
const LINE_MAX_OCTETS: u64 = 64 * 1024;

/// What some programs put in front of UTF-8.
const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

/// The fields of a line. The last three are written only: they are the service's
/// to choose.
const FIELDS: [&str; 7] =
    ["id", "username", "email", "display_name", "create_time", "update_time", "revision"];

/// How a file is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// One JSON object a line.
    Jsonl,
    /// RFC 4180, with a header.
    Csv,
}

impl Format {
    /// The one that is asked for, or that the name of the file says.
    pub fn of(path: &Path, asked: Option<Self>) -> anyhow::Result<Self> {
        let extension = path.extension().unwrap_or_default().to_ascii_lowercase();
        match (asked, extension.to_str()) {
            (Some(format), _) => Ok(format),
            (None, Some("jsonl" | "ndjson")) => Ok(Self::Jsonl),
            (None, Some("csv")) => Ok(Self::Csv),
            _ => bail!("is it JSON Lines or CSV? Say --format jsonl or --format csv"),
        }
    }
}

/// A user of a file.
pub struct Line {
    /// Of the line, from 1 on.
    pub number: u64,
    /// The user, or why it cannot be read.
    pub user: Result<pb::User, String>,
}

/// The users of a file, in its order.
pub type Lines = Box<dyn Iterator<Item = anyhow::Result<Line>> + Send>;

/// Reads a file. In CSV, too, a user is a line: no field of one may have a line break,
/// so a quote that is not closed spoils its own line and no other.
pub fn read(format: Format, file: impl Read + Send + 'static) -> anyhow::Result<Lines> {
    let mut file = Texts { file: BufReader::new(file), number: 0 };
    let mut parse: Parse = match format {
        Format::Jsonl => Box::new(parse_json),
        Format::Csv => {
            let header = file.next().context("the file is empty: a header is needed")??;
            let mut csv = Csv::new(&header.text.map_err(anyhow::Error::msg)?)?;
            Box::new(move |text| csv.parse(text))
        }
    };
    Ok(Box::new(file.map(move |line| {
        let Text { number, text } = line?;
        Ok(Line { number, user: text.and_then(|text| parse(&text)) })
    })))
}

/// Reads a user from a line.
type Parse = Box<dyn FnMut(&[u8]) -> Result<pb::User, String> + Send>;

/// A line as it stands in the file, or why it cannot be one.
struct Text {
    number: u64,
    text: Result<Vec<u8>, String>,
}

/// The lines of a file that are not blank, each with a line feed at its end.
struct Texts<R> {
    file: BufReader<R>,
    number: u64,
}

impl<R: Read> Texts<R> {
    fn read(&mut self) -> io::Result<Option<Text>> {
        loop {
            let mut text = Vec::new();
            if self.file.by_ref().take(LINE_MAX_OCTETS).read_until(b'\n', &mut text)? == 0 {
                return Ok(None);
            }
            self.number += 1;
            if self.number == 1 && text.starts_with(BYTE_ORDER_MARK) {
                text.drain(..BYTE_ORDER_MARK.len());
            }
            let is_whole = text.ends_with(b"\n");
            if !is_whole && text.len() as u64 == LINE_MAX_OCTETS {
                self.file.skip_until(b'\n')?;
                return Ok(Some(Text { number: self.number, text: Err("is too long".to_owned()) }));
            }
            if !is_whole {
                text.push(b'\n');
            }
            if !text.trim_ascii().is_empty() {
                return Ok(Some(Text { number: self.number, text: Ok(text) }));
            }
        }
    }
}

impl<R: Read> Iterator for Texts<R> {
    type Item = anyhow::Result<Text>;

    fn next(&mut self) -> Option<Self::Item> {
        self.read().context("cannot read the file").transpose()
    }
}

/// A user in JSON. No field is needed here: the service says what is missing.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Input {
    id: Option<String>,
    username: Option<String>,
    email: Option<String>,
    display_name: Option<String>,
    #[serde(default, rename = "create_time")]
    _create_time: IgnoredAny,
    #[serde(default, rename = "update_time")]
    _update_time: IgnoredAny,
    #[serde(default, rename = "revision")]
    _revision: IgnoredAny,
}

fn parse_json(text: &[u8]) -> Result<pb::User, String> {
    let input: Input = serde_json::from_slice(text).map_err(|error| error.to_string())?;
    Ok(pb::User {
        id: input.id.unwrap_or_default(),
        username: input.username.unwrap_or_default(),
        email: input.email.unwrap_or_default(),
        display_name: input.display_name.unwrap_or_default(),
        ..Default::default()
    })
}

/// Reads lines of CSV.
struct Csv {
    reader: csv_core::Reader,
    header: Vec<String>,
}

impl Csv {
    fn new(text: &[u8]) -> anyhow::Result<Self> {
        let mut reader = csv_core::Reader::new();
        let header = fields(&mut reader, text).map_err(|what| anyhow!("the header {what}"))?;
        for (n, field) in header.iter().enumerate() {
            let is_known = FIELDS.contains(&field.as_str());
            ensure!(is_known, "the header has {field:?}: the fields are {}", FIELDS.join(", "));
            ensure!(!header.iter().take(n).any(|other| other == field), "the header has {field:?} twice");
        }
        Ok(Self { reader, header })
    }

    fn parse(&mut self, text: &[u8]) -> Result<pb::User, String> {
        let fields = fields(&mut self.reader, text)?;
        if fields.len() != self.header.len() {
            return Err(format!("has {} fields, but the header has {}", fields.len(), self.header.len()));
        }
        let mut user = pb::User::default();
        for (name, value) in self.header.iter().zip(fields) {
            match name.as_str() {
                "id" => user.id = value,
                "username" => user.username = value,
                "email" => user.email = value,
                "display_name" => user.display_name = value,
                _ => {}
            }
        }
        Ok(user)
    }
}

/// The fields of a line of CSV.
fn fields(reader: &mut csv_core::Reader, text: &[u8]) -> Result<Vec<String>, String> {
    let mut values = vec![0; text.len()];
    let mut ends = [0; FIELDS.len() + 1];
    reader.reset();
    let (result, _, _, count) = reader.read_record(text, &mut values, &mut ends);
    match result {
        ReadRecordResult::Record => {}
        ReadRecordResult::InputEmpty => return Err("has a quote that is not closed".to_owned()),
        _ => return Err(format!("has more than {} fields", FIELDS.len())),
    }
    let mut start = 0;
    let mut fields = Vec::with_capacity(count);
    for end in ends.into_iter().take(count) {
        let value = values.get(start..end).unwrap_or_default();
        fields.push(String::from_utf8(value.to_vec()).map_err(|_| "is not UTF-8")?);
        start = end;
    }
    Ok(fields)
}

/// A user as it is written.
#[derive(Serialize)]
struct Output<'a> {
    id: &'a str,
    username: &'a str,
    email: &'a str,
    display_name: &'a str,
    create_time: String,
    update_time: String,
    revision: i64,
}

/// Writes users to a file.
pub enum Writer<W: Write> {
    /// One JSON object a line.
    Jsonl(BufWriter<W>),
    /// RFC 4180, with a header.
    Csv(Box<csv::Writer<W>>),
}

impl<W: Write + Send + 'static> Writer<W> {
    /// Begins the file.
    pub fn new(format: Format, file: W) -> anyhow::Result<Self> {
        Ok(match format {
            Format::Jsonl => Self::Jsonl(BufWriter::new(file)),
            Format::Csv => {
                let mut csv = csv::WriterBuilder::new().has_headers(false).from_writer(file);
                csv.write_record(FIELDS)?;
                Self::Csv(Box::new(csv))
            }
        })
    }

    /// Writes a user.
    pub fn write(&mut self, user: &pb::User) -> anyhow::Result<()> {
        let time = |time: &Option<prost_types::Timestamp>| time.map_or_else(String::new, |t| t.to_string());
        let line = Output {
            id: &user.id,
            username: &user.username,
            email: &user.email,
            display_name: &user.display_name,
            create_time: time(&user.create_time),
            update_time: time(&user.update_time),
            revision: user.revision,
        };
        match self {
            Self::Jsonl(file) => {
                serde_json::to_writer(&mut *file, &line)?;
                file.write_all(b"\n")?;
            }
            Self::Csv(csv) => csv.serialize(line)?,
        }
        Ok(())
    }

    /// Ends the file and gives it back.
    pub fn finish(self) -> anyhow::Result<W> {
        match self {
            Self::Jsonl(file) => file.into_inner().map_err(|error| error.into_error().into()),
            Self::Csv(csv) => csv.into_inner().map_err(|error| error.into_error().into()),
        }
    }
}
